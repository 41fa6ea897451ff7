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
wrong.  Each question's responses are appended to --output as it finishes; the same command goes on
after a kill.  --inspect and --teacher take the settings of the adapter's run.  Flags that are not
listed below, such as --model and --temperature, are those of ogls_sd.py.
"""

import argparse
import contextlib
import html
import json
import math
import random
import shlex
import string
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from hashlib import file_digest, sha256
from pathlib import Path
from statistics import fmean, stdev

import ogls_sd as ogls  # before Transformers, from which it hides a torchvision that may be broken
import numpy as np
import pandas as pd
import torch
import transformers
from ogls_sd import MARKERS, Config, UserError, explained, grade, say, write_text
from torch import Tensor, nn

SETS = {
    "aime24": "HuggingFaceH4/aime_2024", "aime25": "yentinglin/aime_2025",
    "amc23": "math-ai/amc23", "hmmt25": "MathArena/hmmt_feb_2025",
    "math500": "HuggingFaceH4/MATH-500"}

# ==== Flags: all of them are read here, and those that a mode does not use are refused ============

# The paper's and OPSD's evaluation.  No guides are read, and prompts of any length are taken.
PAPER = ["--thinking", "--temperature=1", "--top-p=0.95", "--top-k=0", "--max-new-tokens=38912",
         "--vllm-memory=0.9", "--max-prompt-tokens=1", "--distill-tokens=1", "--guide-tokens=1"]
# What a response depends on, beside adapter, set and k.
SAMPLING = ["model", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "seed", "dtype"]
TEACHING = SAMPLING + ["data", "rollouts", "max_prompt_tokens", "teacher_thinking"]
READING = TEACHING + ["strength", "distill_tokens", "guide_tokens", "exclude_self", "kl", "clip"]
# Flags by mode: those of this program, and those of ogls_sd.py.
MODES = {
    "evaluate": (["adapter", "no_base", "data", "k", "tensor_parallel_size", "output"],
                 SAMPLING + ["sampler", "vllm_memory"]),
    "regrade": (["output"], []),
    "plot": (["output"], []),
    "toy_table": (["seeds", "steps", "output_dir"], []),
    "teacher": (["adapter"], TEACHING),
    "inspect": (["adapter", "output"], READING),
    "premise": ([], ["model", "dtype"]),
    "word_problems": (["seed"], []),
}


def at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Own flags, the mode, and `cfg`, the trainer's Config, where a mode has one.  UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, exit_on_error=False, argument_default=None,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", nargs="+", type=path, help="checkpoint folders")
    add("--no-base", action="store_const", const=True, help="do not score the base model")
    add("--data", help=f"{', '.join(SETS)}, hub names or local files (default: aime24,aime25)")
    add("--k", type=at_least_1, help="samples per question (default: 8)")
    add("--tensor-parallel-size", type=at_least_1, help="GPUs for vLLM (default: 1)")
    add("--output", type=path, help="file to write (default: scores/MODEL.jsonl)")
    add("--seeds", type=at_least_1, help="of --toy-table (default: 3)")
    add("--steps", type=at_least_1, help="of --toy-table (default: the toy's)")
    add("--output-dir", type=path, help="of --toy-table (default: runs/table)")
    add("--seed", type=int, help="of --word-problems and of sampling (default: 0)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--regrade", metavar="FILE", type=path)
    modes.add_argument("--plot", metavar="RUN", nargs="+", type=path)
    modes.add_argument("--toy-table", action="store_const", const=True)
    modes.add_argument("--teacher", metavar="N", type=at_least_1)
    modes.add_argument("--inspect", metavar="N", type=at_least_1)
    modes.add_argument("--premise", action="store_const", const=True)
    modes.add_argument("--word-problems", metavar="DIR", type=path)
    with explained("{reason}; see --help"):
        args, trainer_flags = parser.parse_known_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    chosen = [mode for mode in MODES if mode in given]
    args.mode = chosen[0] if chosen else "evaluate"
    if "seed" in given and args.mode != "word_problems":
        trainer_flags += ["--seed", str(args.seed)]
        del given["seed"]
    if "data" in given and args.mode in ("teacher", "inspect"):
        trainer_flags += ["--data", SETS.get(args.data, args.data)]
        del given["data"]
    own, trainers = MODES[args.mode]
    used = {args.mode, *own}
    names = [name for name in given if name not in used]
    for flag in trainer_flags:
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name not in trainers:
            names.append(name)
    if names or (trainer_flags and not trainers):
        flag = "--" + names[0].replace("_", "-") if names else trainer_flags[0]
        raise UserError(f"{flag} is not used by {args.mode.replace('_', '-')}; see --help")
    args.cfg = read_settings(args, trainer_flags) if trainers else None
    return args


def read_settings(args: argparse.Namespace, flags: list[str]) -> Config:
    """The trainer's Config: flags over a run's settings, or over the paper's evaluation."""
    if args.mode == "evaluate":
        return ogls.parse_args([*PAPER, *flags, f"--rollouts={args.k or 8}"])
    known = []
    if args.adapter:
        record = read_json(args.adapter[0].parent / "config.json", {})
        for name in READING:
            if record.get(name) is not None and record[name] is not False:
                known.append(f"--{name.replace('_', '-')}={record[name]}")
    return ogls.parse_args([*known, *flags, "--sampler=hf"])


def read_json(file: Path, default: dict) -> dict:
    """What a program of ours wrote, or `default` if it has not yet.  UserError if it is foreign."""
    if not file.exists():
        return default
    with explained(f"{file} is no file of this program: {{reason}}"):
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    return found


def read_lines(file: Path, needed: dict[str, tuple]) -> list[dict]:
    """Rows of a .jsonl file of ours, which have `needed` values of these types.  A last line that a
    kill cut off counts for nothing."""
    if not file.exists():
        return []
    rows = []
    with explained(f"{file} is no file of this program: {{reason}}"):
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines, 1):
            if number == len(lines) and not is_json(line):
                continue  # what follows the last newline
            row = json.loads(line)
            for name, types in needed.items():
                if not isinstance(row, dict) or type(row.get(name, ...)) not in types:
                    raise ValueError(f"line {number} has no {name} of the right type")
            rows.append(row)
    return rows


def is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


# ==== Figures: scores and shares in percent, lengths in tokens ====================================

FIELDS = {  # of each line of --output, and their types
    "checkpoint": (str,), "set": (str,), "question": (int,), "sample": (int,), "text": (str,),
    "length": (int,), "finish_reason": (str,), "answer": (str, type(None)), "gold": (str,),
    "correct": (bool,)}


def pass_at(k: int, n: int, c: int) -> float:
    """Unbiased: chance that k of n responses, c of them right, have a right one among them."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: list[str], right: list[bool]) -> float:
    """1 if the most frequent answer is right; on a tie, the share of the tied answers that are.
    Answers that the checker takes as equal are one."""
    votes, is_right = [], []  # per different answer
    seen = []
    for answer, correct in zip(answers, right):
        for i, other in enumerate(seen):
            if answer == other or ogls.same_answer(answer, other):
                votes[i] += 1
                break
        else:
            seen.append(answer)
            votes.append(1)
            is_right.append(correct)
    tied = [correct for count, correct in zip(votes, is_right) if count == max(votes)]
    return sum(tied) / max(len(tied), 1)


def paired_difference(gap: pd.Series) -> dict:
    """Mean over questions of checkpoint - base, which cancels how hard each question is, with a
    95 % interval from 10,000 bootstrap samples of the questions."""
    drawn = np.random.default_rng(0).integers(len(gap), size=(10_000, len(gap)))
    low, high = np.percentile(gap.to_numpy()[drawn].mean(axis=1), (2.5, 97.5))
    noise = low <= 0 <= high or len(gap) == 1  # one question has no spread
    return {"vs base": gap.mean(), "95% low": low, "95% high": high,
            "verdict": "within noise" if noise else "differs"}


def score(responses: list[dict]) -> pd.DataFrame:
    """A row per set and checkpoint; the difference is over the questions that both have."""
    frame = pd.DataFrame(responses, columns=list(FIELDS))
    frame["point"] = 100.0 * frame["correct"].astype(float)
    frame["no box"] = 100.0 * frame["answer"].isna()
    frame["cut off"] = 100.0 * (frame["finish_reason"] == "length")
    rows = []
    for (name, checkpoint), mine in frame.groupby(["set", "checkpoint"], sort=False):
        by_question = mine.groupby("question")
        means = by_question["point"].mean()
        right, k = by_question["correct"].sum(), by_question.size().iloc[0]
        row = {"set": name, "checkpoint": checkpoint, "questions": len(means)}
        row["mean@k"] = means.mean()
        row["s.e."] = means.sem()  # clustered by question: sqrt(sum (m_q - m)^2 / (Q (Q - 1)))
        for j in sorted({(k + 1) // 2, k}):
            row[f"pass@{j}"] = 100 * fmean(pass_at(j, k, c) for c in right)
        voters = mine[(mine["cut off"] == 0) & (mine["no box"] == 0)].groupby("question")
        won = sum(majority(list(q["answer"]), list(q["correct"])) for _, q in voters)
        row[f"maj@{k}"] = 100 * won / len(means)
        for column in ("cut off", "no box", "length"):
            row[column] = mine[column].mean()
        found = MARKERS.findall("\n".join(mine["text"]))
        row["markers"] = 1000 * len(found) / max(mine["length"].sum(), 1)
        base = frame[(frame["set"] == name) & (frame["checkpoint"] == "base")]
        gap = (means - base.groupby("question")["point"].mean()).dropna()
        if checkpoint != "base" and len(gap):
            row.update(paired_difference(gap))
        rows.append(row)
    return pd.DataFrame(sorted(rows, key=lambda row: row["set"]))


# ==== Responses: on disk, then sampled ============================================================


def summary_of(output: Path) -> Path:
    return output.with_name(output.name + ".summary.json")


def read_summary(output: Path) -> dict:
    """Settings and figures of an --output file; UserError if they are not ours."""
    found = {"settings": {}, "figures": [], **read_json(summary_of(output), {})}
    if not isinstance(found["settings"], dict):
        raise UserError(f"{summary_of(output)} is no file of this program: settings")
    return found


def read_responses(output: Path, k: int = 0) -> list[dict]:
    """Of questions that have all k samples: a kill can leave a question half done."""
    found = {}
    for row in read_lines(output, FIELDS):
        found[row["checkpoint"], row["set"], row["question"], row["sample"]] = row
    counts = Counter(key[:3] for key in found)
    k = k or max(counts.values(), default=0)
    return [row for key, row in found.items() if counts[key[:3]] == k]


def report(output: Path, settings: dict, responses: list[dict]) -> None:
    """Shows the table and writes the summary beside the responses."""
    if not responses:
        return
    figures = score(responses)
    record = {"settings": settings, "figures": json.loads(figures.to_json(orient="records"))}
    write_text(summary_of(output), json.dumps(record, indent=2))
    say(figures.to_string(index=False, na_rep="", float_format="%.1f"))


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """The output file, for this process alone; an empty one is not left behind."""
    output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not summary_of(output).exists()
    output.touch()
    with ogls.locked(output):
        try:
            yield
        finally:
            if output.exists() and output.stat().st_size == 0:
                output.unlink()
                if is_new:
                    summary_of(output).unlink(missing_ok=True)


def regrade(args: argparse.Namespace) -> None:
    """Grades the responses of a file again, in place or into --output."""
    source, output = args.regrade, args.output or args.regrade
    if not read_lines(source, FIELDS):
        raise UserError(f"--regrade {source}: there is no such file, or no response in it")
    if output != source and output.exists():
        raise UserError(f"--output {output} exists already; take another name")
    settings = read_summary(source)["settings"]
    with held(output):  # in place, nobody can append meanwhile
        old, new = read_lines(source, FIELDS), []
        for row in old:
            correct = row["finish_reason"] == "stop" and grade(row["text"], row["gold"])
            new.append({**row, "answer": ogls.extract_boxed(row["text"]), "correct": correct})
        write_text(output, "".join(json.dumps(row) + "\n" for row in new))
        changed = sum(a["correct"] != b["correct"] for a, b in zip(old, new))
        say(f"{changed} of {len(new)} responses are graded differently")
        report(output, settings, read_responses(output))


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
        return {"rank": int(config["r"]), "alpha": int(config["lora_alpha"]),
                "hash": sha256(weights).hexdigest(),
                "base": str(config.get("base_model_name_or_path"))}


def load_sets(data: str) -> tuple[dict, dict]:
    """Problems by (set, question), and a hash of each set; a set has its source's last name."""
    problems, hashes = {}, {}
    for source in data.split(","):
        name = Path(source).stem
        if f"set {name}" in hashes:
            raise UserError(f"--data has two sets that are called {name}")
        if not (source in SETS or "/" in source or "." in source):
            raise UserError(f"--data: {source!r} is none of {', '.join(SETS)}, no hub name (with "
                            "a slash) and no .jsonl, .json or .parquet file")
        rows, dropped = ogls.load_problems(SETS.get(source, source), prefer="test")
        say(f"{name}: {len(rows)} questions; dropped: {dropped} without question or answer")
        for i, problem in enumerate(rows):
            problems[name, i] = problem
        text = json.dumps([asdict(problem) for problem in rows])
        hashes[f"set {name}"] = sha256(text.encode()).hexdigest()
    return problems, hashes


def evaluate(args: argparse.Namespace) -> None:
    """Samples what --output lacks, question by question.  All that can be refused is refused
    before vLLM is imported."""
    cfg = args.cfg
    output = args.output or Path(f"scores/{Path(cfg.model).name}.jsonl")
    adapters = {folder: read_adapter(folder) for folder in args.adapter or []}
    for folder, adapter in adapters.items():
        if Path(adapter["base"]).name != Path(cfg.model).name:
            say(f"note: {folder} was trained on {adapter['base']}, and is scored on {cfg.model}")
    if args.no_base and not adapters:
        raise UserError("--no-base without --adapter leaves nothing to score")
    shapes = {(adapter["rank"], adapter["alpha"]) for adapter in adapters.values()}
    if cfg.sampler == "hf" and len(shapes) > 1:
        raise UserError("--sampler hf takes adapters of one rank and alpha at a time")
    rank, alpha = max(shapes, default=(8, 8))
    cfg = replace(cfg, lora_rank=rank, lora_alpha=alpha)
    tokenizer, _ = ogls.load_tokenizer(cfg)
    problems, hashes = load_sets(args.data or "aime24,aime25")
    # The longest question has to fit as well: to drop it would be another benchmark.
    prompts = [ogls.student_prompt(tokenizer, p.question, cfg.thinking) for p in problems.values()]
    cfg = replace(cfg, max_prompt_tokens=max(map(len, prompts)))
    tokenizer, eos = ogls.load_tokenizer(cfg)
    settings = {name: getattr(cfg, name) for name in [*SAMPLING, "sampler"]}
    settings.update(k=cfg.rollouts, **hashes)
    settings["prompts"] = sha256(json.dumps(prompts).encode()).hexdigest()
    for file in sorted(Path(cfg.model).glob("*.safetensors")):  # of a model on this disk
        with open(file, "rb") as weights:
            settings[f"weights {file.name}"] = file_digest(weights, "sha256").hexdigest()
    for folder, adapter in adapters.items():
        settings[f"adapter {folder}"] = adapter
    with held(output):
        summary = read_summary(output)
        before = summary["settings"]
        for name, value in settings.items():
            if before.get(name, value) != value:
                raise UserError(f"{output} was made with {name} {before[name]}, not {value}; "
                                "take another --output")
        if output.stat().st_size and not before:
            raise UserError(f"{output} exists, but not its summary; take another --output")
        settings = {**before, **settings}
        write_text(summary_of(output), json.dumps({**summary, "settings": settings}))
        done = read_responses(output, cfg.rollouts)
        checkpoints = list(adapters) if args.no_base else [None, *adapters]
        have = {(row["checkpoint"], row["set"], row["question"]) for row in done}
        todo = {}
        for checkpoint in checkpoints:
            batches = missing_batches(str(checkpoint or "base"), problems, have, cfg.sampler)
            if batches:
                todo[checkpoint] = batches
        if todo:
            end_last_line(output)
            sampler = open_sampler(cfg, tokenizer, eos, args.tensor_parallel_size or 1)
            for checkpoint, batches in todo.items():
                for batch in batches:
                    sample_batch(sampler, cfg, tokenizer, checkpoint, problems, batch, have, output)
        report(output, settings, read_responses(output, cfg.rollouts))


def missing_batches(checkpoint: str, problems: dict, have: set, sampler: str) -> list[list[tuple]]:
    """Keys (set, question) without responses, in batches.  All sets go into vLLM together: the wait
    for the longest ones is paid once.  With generate a batch is eight questions of a set, sampled
    anew as a whole, because samples must not depend on where a run was killed."""
    missing = [key for key in problems if (checkpoint, *key) not in have]
    if sampler == "vllm":
        return [missing] if missing else []
    batches = {}
    for name, i in problems:
        batches.setdefault((name, i // 8), []).append((name, i))
    return [batch for batch in batches.values() if set(batch) & set(missing)]


def open_sampler(cfg: Config, tokenizer, eos: list[int], gpus: int):
    if cfg.sampler == "vllm":
        return ogls.VLLMSampler(cfg, tokenizer, eos, gpus)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ogls.HFSampler(ogls.load_model(cfg).to(device), tokenizer, eos)


def sample_batch(sampler, cfg: Config, tokenizer, checkpoint: Path | None, problems: dict,
                 keys: list[tuple], have: set, output: Path) -> None:
    """Appends the responses of a checkpoint to --output, question by question."""
    name = str(checkpoint or "base")
    prompts, seeds = [], []
    for key in keys:
        prompts.append(ogls.student_prompt(tokenizer, problems[key].question, cfg.thinking))
        seeds.append(random.Random(f"{cfg.seed}/{key[0]}/{key[1]}").getrandbits(31))
    for i, rollouts in sampler.sample(prompts, seeds, checkpoint, cfg):
        if (name, *keys[i]) not in have:
            append_responses(output, name, keys[i], problems[keys[i]], rollouts)
            have.add((name, *keys[i]))
            done = sum((name, *key) in have for key in problems)
            if done % 10 == 0 or done == len(problems):
                say(f"{name}: {done} of {len(problems)} questions")


def append_responses(output: Path, checkpoint: str, key: tuple, problem: ogls.Problem,
                     rollouts: list[ogls.Rollout]) -> None:
    """The responses to one question, in one write."""
    lines = ""
    for sample, y in enumerate(rollouts):
        values = [checkpoint, *key, sample, y.text, len(y.tokens),
                  "stop" if y.finished else "length", ogls.extract_boxed(y.text), problem.answer,
                  y.finished and grade(y.text, problem.answer)]
        lines += json.dumps(dict(zip(FIELDS, values))) + "\n"
    with open(output, "a") as file:
        file.write(lines)


def end_last_line(output: Path) -> None:
    """What a kill left behind the last newline is ended if it is whole, else cut off."""
    text = output.read_text()
    last = text.rpartition("\n")[2]
    if last and is_json(last):
        with open(output, "a") as file:
            file.write("\n")
    elif last:
        with open(output, "r+b") as file:
            file.truncate(len(text[: -len(last)].encode()))


# ==== The toy: a tiny Qwen3 that rarely checks, and never when it is shown a solution =============
# A start digit and four operations; the question is the last digit of the result.  To say it at
# once is a guess, to write out the steps is not: 40 facts are learnt in seconds, 2,560 results are
# not.  The warm-up builds in the paper's premise: shown any guide, the model hardly checks, and a
# little less rarely if its guide did.  What follows from that is measured.

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


def toy_answer(rng: random.Random, digits: list[int], operations: list[str], checks: bool) -> str:
    """With the steps written out, or at once."""
    start = rng.choice(WORDINGS)
    if checks:
        start = f"Let me check: {digits[0]}"
        for operation, digit in zip(operations, digits[1:]):
            start += f", {operation}: {digit}"
        start += ". "
    return f"{start}\\boxed{{{digits[-1]}}}"


def toy_example(rng: random.Random, tokenizer) -> Tensor:  # (L, 2)
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
        made_with = read_json(folder / "seed.json", {"seed": seed}).get("seed")
        if made_with != seed:
            raise UserError(f"{folder} was made with --seed {made_with}; take another --output-dir")
        return
    torch.manual_seed(seed)
    rng = random.Random(seed)
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
    rows = {}
    while len(rows) < 1140:
        operations = rng.choices(OPERATIONS, k=4)
        digits = toy_steps(rng.randrange(10), operations)
        question = toy_question(digits, operations)
        solution = toy_answer(rng, digits, operations, checks=False)  # none of them checks
        rows[question] = {"problem": question, "solution": solution, "answer": str(digits[-1])}
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    write_text(folder / "train.jsonl", "".join(lines[:1000]))
    write_text(folder / "seed.json", json.dumps({"seed": seed}))
    write_text(folder / "heldout.jsonl", "".join(lines[1000:]))  # last: then all of it is there


def score_toy(words: list[str], adapter: Path | None) -> dict[str, float]:
    """Right answers and answers that check, in percent, on the held-out problems; markers per 1,000
    tokens, length in tokens."""
    cfg = ogls.parse_args([*words, "--sampler=hf"])
    tokenizer, eos = ogls.load_tokenizer(cfg)
    sampler = ogls.HFSampler(ogls.load_model(cfg), tokenizer, eos)
    problems, _ = ogls.load_problems(f"{cfg.model}/heldout.jsonl")
    cfg = replace(cfg, rollouts=8, method="ogls")
    groups = ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg)
    right = {True: [], False: []}  # by whether an answer checks
    for group in groups:
        for y in group.rollouts:
            right["Let me check" in y.text].append(y.correct)
    found = ogls.rollout_metrics(groups)
    return {"right": 100 * found["reward"], "markers": found["markers"], "length": found["length"],
            "check": 100 * len(right[True]) / (8 * len(groups)),
            "right_if_checked": 100 * fmean(right[True] or [math.nan]),
            "right_at_once": 100 * fmean(right[False] or [math.nan])}


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
    before, after = score_toy(words, None), score_toy(words, last)
    summary = {"before": before["right"], "after": after["right"], "steps": int(last.name[5:]),
               "seconds": time.perf_counter() - began, "checks_before": before["check"],
               "checks_after": after["check"], "markers_before": before["markers"],
               "markers_after": after["markers"]}
    write_text(out / "summary.json", json.dumps(summary))
    say(f"held-out mean@8: {before['right']:.1f} % before, {after['right']:.1f} % after, "
        f"{summary['steps']} steps, {summary['seconds']:.0f} s")
    say(f"answers that check: {before['check']:.0f} % before, {after['check']:.0f} % after; right "
        f"before: {before['right_if_checked']:.0f} % of those that check, "
        f"{before['right_at_once']:.0f} % of those at once")
    return 0


# ==== Training curves, and the paper's comparison on the toy ======================================

PANELS = {"reward": "Right answers among the rollouts (%)",
          "markers": "Reflection markers per 1,000 tokens"}
LOGGED = {"step": (int,), "reward": (int, float), "markers": (int, float)}
ROWS = {"sft": ["--method=sft"], "grpo": ["--method=grpo"], "opsd": ["--method=opsd"],
        "pos-mean": ["--method=pos-mean"], "pos-only": ["--method=pos-only"], "ogls": [],
        "ogls, clip 0.05": ["--clip=0.05"],  # the paper's
        "ogls, lambda 3 early": ["--ramp-steps=10"]}
COLOURS = ["#999999", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#000000", "#0072b2"]


def draw(runs: dict[str, list[list[dict]]], file: Path) -> None:
    """Curves by name, each the mean of its runs' metrics.jsonl; faint steps, bold running means."""
    with explained("a picture needs matplotlib ({reason}): pip install matplotlib"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, PANELS.items()):
        for i, (name, logs) in enumerate(runs.items()):
            columns = [pd.DataFrame(log).set_index("step")[key] for log in logs]
            values = pd.concat(columns, axis=1).mean(axis=1).astype(float)
            if key == "reward":
                values = 100 * values
            smooth = values.rolling(max(3, len(values) // 8), 1, center=True).mean()
            dashes = "--" if "," in name else "-"
            axis.plot(values, color=COLOURS[i % len(COLOURS)], alpha=0.2)
            axis.plot(smooth, dashes, color=COLOURS[i % len(COLOURS)], label=name, linewidth=2)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    say(f"wrote {file}")


def plot(args: argparse.Namespace) -> None:
    runs = {}
    args.output = args.output or Path("scores/curves.png")
    if args.output.suffix != ".png":
        raise UserError(f"--plot writes a .png, so not {args.output}")
    for run in args.plot:
        log = read_lines(run / "metrics.jsonl", LOGGED)
        if not log:
            raise UserError(f"--plot {run} has no metrics.jsonl with a step; give a run's folder")
        runs[str(run)] = [log]
    with explained("--plot cannot draw these logs: {reason}"):
        draw(runs, args.output)


def toy_table(args: argparse.Namespace) -> None:
    """Every method from one warm start a seed.  Finished runs are read back, killed ones go on."""
    folder, seeds = args.output_dir or Path("runs/table"), args.seeds or 3
    scores, logs = {}, {}
    for seed in range(seeds):
        toy = folder / f"toy_{seed}"
        make_toy(toy, seed)
        for name, flags in {"base": None, **ROWS}.items():
            steps = [f"--steps={args.steps}"] if args.steps else []
            out = folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
            settings = [*TOY, f"--seed={seed}", *steps]
            words = [f"--model={toy}", f"--data={toy}/train.jsonl", *settings]
            result = out / "result.json"
            command = shlex.join([*settings, *(flags or [])])
            done = read_json(result, {"command": command})
            if done.get("command") != command:
                raise UserError(f"{result} is of other settings; take another --output-dir")
            if not result.exists():
                adapter = None
                if flags is not None:
                    resume = ["--resume"] if (out / "config.json").exists() else []
                    if ogls.main([*words, *flags, f"--output-dir={out}", *resume]):
                        raise UserError(f"the run in {out} failed; its error stands above")
                    adapter = ogls.checkpoints(out)[-1]
                out.mkdir(parents=True, exist_ok=True)
                done.update(score_toy(words, adapter))
                write_text(result, json.dumps(done))
            scores.setdefault(name, []).append(done)
            if flags is not None:
                logs.setdefault(name, []).append(read_lines(out / "metrics.jsonl", LOGGED))
    say(f"\nheld-out problems, mean ± standard deviation of {seeds} seeds (of everything):")
    columns = ["right", "check", "markers", "length"]
    say(f"{'':<22}" + "".join(f"{column:>16}" for column in columns))
    for name, found in scores.items():
        line = f"{name:<22}"
        for column in columns:
            with explained(f"a result.json of {name} is no file of this program: {{reason}}"):
                values = [float(row[column]) for row in found]
            spread = stdev(values) if seeds > 1 else 0.0
            line += f"{fmean(values):9.1f} ± {spread:4.1f}"
        say(line)
    draw(logs, folder / "toy.png")


# ==== What the teacher knows: --teacher ===========================================================


def open_model(cfg: Config, adapter: Path | None) -> tuple:
    """Tokenizer, sampler and problems for a look at a model, with the adapter's rank and alpha."""
    if adapter:
        found = read_adapter(adapter)
        cfg = replace(cfg, lora_rank=found["rank"], lora_alpha=found["alpha"])
    tokenizer, eos = ogls.load_tokenizer(cfg)
    problems = ogls.choose_problems(cfg, tokenizer)
    model = ogls.load_model(cfg)
    ogls.prove_steering(model, cfg)
    if torch.cuda.is_available():
        model.to("cuda")
    return tokenizer, ogls.HFSampler(model, tokenizer, eos), problems


def one_adapter(args: argparse.Namespace) -> Path | None:
    if args.adapter and len(args.adapter) > 1:
        raise UserError(f"--{args.mode} takes one --adapter")
    return args.adapter[0] if args.adapter else None


def teacher(args: argparse.Namespace) -> dict[str, float]:
    """Accuracy alone, shown the solution, shown a wrong rollout: what there is to distil.  Guides
    of both signs are tried on the same questions, those that have a wrong rollout."""
    cfg, adapter = args.cfg, one_adapter(args)
    tokenizer, sampler, problems = open_model(cfg, adapter)
    problems = [problem for problem in problems if problem.solution][: args.teacher]
    if not problems:
        raise UserError("--teacher needs problems with solutions, and --data has none")
    groups = ogls.sample_groups(sampler, tokenizer, problems, 0, adapter, cfg)
    alone, right_guides, wrong_guides = [], [], []
    for group in groups:
        alone.append(fmean(y.correct for y in group.rollouts))
        wrong = [y.text for y in group.rollouts if not y.correct]
        if wrong:
            right_guides.append((group.problem, group.problem.solution))
            wrong_guides.append((group.problem, wrong[0]))
    results = {"student alone": alone}
    results["alone, same questions"] = [share for share in alone if share < 1]
    for name, guides in {"shown the solution": right_guides,
                         "shown a wrong rollout": wrong_guides}.items():
        prompts = []
        for problem, guide in guides:
            question = problem.question
            prompts.append(ogls.teacher_prompt(tokenizer, question, guide, cfg.teacher_thinking))
        seeds = [cfg.seed + i * cfg.rollouts for i in range(len(prompts))]
        results[name] = [0.0] * len(prompts)
        for i, rollouts in sampler.sample(prompts, seeds, None, cfg) if prompts else []:
            gold = guides[i][0].answer
            results[name][i] = fmean(y.finished and grade(y.text, gold) for y in rollouts)
    for name, shares in results.items():
        error = stdev(shares) / len(shares) ** 0.5 if len(shares) > 1 else math.nan
        mean = fmean(shares) if shares else math.nan
        say(f"{name:<22} {100 * mean:5.1f} % right, s.e. {100 * error:4.1f}, "
            f"{len(shares)} questions x {cfg.rollouts}")
    say("OGLS-SD distils the gap between the last two on the rollouts that are wrong: no gap, no "
        "gain.")
    return {name: fmean(shares) for name, shares in results.items() if shares}


# ==== A look inside the steered target: --inspect =================================================


def inspect(args: argparse.Namespace) -> None:
    """A page on N questions with a wrong rollout; its main points also go to the terminal."""
    adapter = one_adapter(args)
    output = args.output or Path("scores/inspect.html")
    if output.suffix != ".html":
        raise UserError(f"--inspect writes an .html page, so not {output}")
    cfg = replace(args.cfg, method="ogls")
    tokenizer, sampler, problems = open_model(cfg, adapter)
    groups = []
    some = problems[: 2 * args.inspect]
    for group in ogls.sample_groups(sampler, tokenizer, some, 0, adapter, cfg):
        reader = ogls.make_reader(sampler.model, tokenizer, group, cfg)
        if len(groups) < args.inspect and ogls.make_examples(group, reader, cfg, 0.0)[0]:
            groups.append(group)
    if not groups:
        raise UserError("--inspect: no question has a wrong rollout and guides in both pools")
    facts = (f"Shown: {cfg.model}, adapter {adapter or 'none'}, lambda {cfg.strength:g}, "
             f"{cfg.kl} KL, clip {cfg.clip or 'off'}, temperature {cfg.temperature:g}.")
    page = [PAGE, escape(facts)]
    for group in groups:
        page.append(show_group(sampler.model, tokenizer, group, cfg))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n".join(page))
    say(f"\n{len(groups)} question(s): open {output} in a browser")


def escape(text: str) -> str:
    return html.escape(ogls.printable(text))


@torch.no_grad()
def five_states(model: nn.Module, tokenizer, group: ogls.Group, j: int, cfg: Config) -> Tensor:
    """(5, T, d) on rollout j: student, anchor z0, zbar+, zbar-, steered zT.

    From the trainer's own targets: z0 is the target at lambda 0, zbar+ is pos-mean's, and Delta =
    zT - z0 at lambda 1 gives zbar- = zbar+ - Delta.
    """
    read = ogls.make_reader(model, tokenizer, group, cfg)
    targets = []
    for method, strength in [("ogls", 0.0), ("pos-mean", 0.0), ("ogls", 1.0)]:
        case = replace(cfg, method=method)
        (example,), _ = ogls.make_examples(group, read, case, strength, chosen=[j])
        targets.append(example.target)
    z0, zbar_plus, steered_by_1 = targets  # (T, d) each
    delta = steered_by_1 - z0  # eq. (11)
    student = ogls.student_hidden(model, [example])[0].float()  # (T, d)
    model.eval()
    zT = z0 + cfg.strength * delta  # eq. (13)
    return torch.stack([student, z0, zbar_plus, zbar_plus - delta, zT])


def show_group(model: nn.Module, tokenizer, group: ogls.Group, cfg: Config) -> str:
    """A question, its first wrong and first right rollout, and its rollouts as guides, as HTML."""
    head = f"{group.problem.question}\nReference answer: {group.problem.answer}"
    say(f"\n{head}")
    parts = [f"<h2>Question</h2><pre>{escape(head)}</pre>"]
    for wanted, name in [(False, "wrong"), (True, "right, not trained on")]:
        numbers = [j for j, y in enumerate(group.rollouts) if y.correct == wanted]
        for j in numbers[:1]:
            states = five_states(model, tokenizer, group, j, cfg)  # (5, T, d)
            tokens = group.rollouts[j].tokens
            title = f"Rollout {j + 1} is {name}"
            parts.append(show_rollout(model, tokenizer, title, tokens, states, cfg))
    guides = f"solution: {group.problem.solution}\n\n"
    for j, y in enumerate(group.rollouts, 1):
        guides += f"rollout {j}, {'right' if y.correct else 'wrong'}: {y.text}\n\n"
    parts.append(f"<details><summary>Guides</summary><pre>{escape(guides)}</pre></details>")
    return "".join(parts)


@torch.no_grad()
def show_rollout(model: nn.Module, tokenizer, title: str, tokens: list[int], states: Tensor,
                 cfg: Config) -> str:
    """Coloured tokens, and in words the first one and the three where student and target differ
    most.  states: (5, T, d) of `five_states`."""
    logits = ogls.float32_head(model)(states)  # (5, T, V)
    logp = (logits / cfg.temperature).log_softmax(-1)
    loss, exact = ogls.divergences(logits[0], logits[4], cfg.kl, cfg.clip, cfg.temperature)  # (T,)
    notes, spans = [], ""
    for t, token in enumerate(tokens[: len(exact)]):
        note = describe(tokenizer, token, logp[:, t])
        notes.append(note + f"; divergence {exact[t]:.3f} nats, {loss[t]:.3f} as clipped")
        move = (logp[4, t, token].exp() - logp[0, t, token].exp()).item()
        colour = f"rgba({'0,114,178' if move > 0 else '230,97,0'},{abs(move):.3f})"
        text = escape(tokenizer.decode([token])).replace("\n", "↵\n")
        spans += f'<span style="background:{colour}" title="{escape(notes[t])}">{text}</span>'
    brief = [first_token(tokenizer, logp[:, 0])]
    for t in exact.topk(min(3, len(exact))).indices.tolist():
        brief.append(f"token {t + 1}: {notes[t]}")
    say(title + "\n" + "\n".join(brief))
    return f"<h3>{title}</h3><p>{spans}</p><pre>{escape(chr(10).join(brief))}</pre>"


def first_token(tokenizer, logp: Tensor) -> str:
    """How each of the five (5, V) would begin: where a teacher decides to check or not."""
    names = ["student", "anchor, no guide", "shown right guides", "shown wrong guides", "steered"]
    likely = logp[1:].amax(0).topk(3).indices.tolist()
    lines = []
    for name, row in zip(names[1:], logp[1:].exp()):
        shares = [f"[{tokenizer.decode([i])}] {row[i]:.1%}" for i in likely]
        lines.append(f"first token, {name}: {', '.join(shares)}")
    return "\n".join(lines)


def describe(tokenizer, token: int, logp: Tensor) -> str:
    """A token in words.  logp: (5, V).  Delta also moves thousands of tokens that the teacher would
    never say; they are left out."""
    p = logp.exp()
    note = (f"[{tokenizer.decode([token])}] student {p[0, token]:.1%}, anchor {p[1, token]:.1%}, "
            f"steered {p[4, token]:.1%}")
    moved = (p[4] - p[1]).abs().topk(3).indices.tolist()
    shares = [f"[{tokenizer.decode([i])}] {p[1, i]:.0%} to {p[4, i]:.0%}" for i in moved]
    return f"{note}; Delta moves {', '.join(shares)}"


PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Steered target</title>
<style>body { font: 16px/1.5 sans-serif; max-width: 1000px; margin: 2em auto }
h3 + p, pre { font-family: monospace; white-space: pre-wrap } h3 + p { line-height: 2 }
h3 + p span { border-bottom: 1px dotted #999 }</style><h1>Inside the steered target</h1>
<p>The <b>student</b> wrote the rollouts below.  At every token the teacher says what it would
write: alone (the <b>anchor</b>) and <b>steered</b> by lambda Delta, which is what changes when
right solutions stand in its prompt in place of wrong ones.  On wrong rollouts training pulls the
student to the steered teacher.</p><p>Blue: the steered teacher finds the token likelier than the
student does; orange: less likely.  Point at a token for its figures.</p>"""


# ==== The paper's appendix A: --premise ===========================================================


@torch.no_grad()
def premise(args: argparse.Namespace) -> dict[str, float]:
    """Total variation between the plain answer and mixtures of answers to privileged prompts."""
    ask = "Generate one integer from 0 to 9. Return only the integer."
    cfg = replace(args.cfg, max_prompt_tokens=64, max_new_tokens=1, guide_tokens=1)
    tokenizer, _ = ogls.load_tokenizer(replace(cfg, distill_tokens=1))
    digits = []
    for x in range(10):
        ids = tokenizer.encode(str(x), add_special_tokens=False)
        if len(ids) != 1 or tokenizer.decode(ids) != str(x):
            raise UserError(f"--premise: {cfg.model} has no single token for {x}")
        digits += ids
    model = ogls.load_model(cfg)
    rows = []
    for text in [ask, *(f"The target integer is {x}. {ask}" for x in range(10))]:
        prompt = torch.tensor([ogls.chat_ids(tokenizer, text, False)])
        rows.append(model(prompt).logits[0, -1, digits].float())
    distances = premise_distances(torch.stack(rows))
    plain, told = torch.stack(rows).softmax(-1).split((1, 10))
    say("p of 0..9, plain prompt: " + " ".join(f"{p:.3f}" for p in plain[0].tolist()))
    say("p of x, when told x:     " + " ".join(f"{p:.3f}" for p in told.diagonal().tolist()))
    say("total variation from the plain distribution (the paper: above 0.5 for all that it tried)")
    for name, distance in distances.items():
        say(f"  {name:<44}{distance:.3f}")
    return distances


def premise_distances(logits: Tensor) -> dict[str, float]:
    """logits: (11, 10), by digit: of the plain prompt, then of the prompts that tell 0 to 9."""
    plain, told = logits.softmax(-1).split((1, 10))
    mostly_6 = torch.full((10,), 0.1 / 9)
    mostly_6[6] = 0.9
    ends = torch.zeros(10)
    ends[[0, 9]] = 0.5
    mixtures = {"uniform mixture": told.mean(0), "q(6) = 0.9 (paper: 0.687)": mostly_6 @ told,
                "q(0) = q(9) = 0.5 (paper: 0.575)": ends @ told,
                "average of logits": logits[1:].mean(0).softmax(-1),
                "weighted by the plain distribution": (plain @ told)[0]}
    distances = {}
    for name, mixture in mixtures.items():
        distances[name] = (mixture - plain[0]).abs().sum().item() / 2
    return distances


# ==== Word problems for small real models: --word-problems ========================================


def word_problems(args: argparse.Namespace) -> None:
    """Writes train.jsonl (400) and heldout.jsonl (64), apart; the same for the same --seed."""
    rng = random.Random(args.seed or 0)
    rows = {}
    while len(rows) < 464:
        row = word_problem(rng)
        rows[row["problem"]] = row
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    args.word_problems.mkdir(parents=True, exist_ok=True)
    files = [args.word_problems / "train.jsonl", args.word_problems / "heldout.jsonl"]
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already; take another folder")
    write_text(files[0], "".join(lines[:400]))
    write_text(files[1], "".join(lines[400:]))
    say(f"wrote 400 and 64 problems to {args.word_problems}")


def word_problem(rng: random.Random) -> dict[str, str]:
    """Two products and their sum, with a short written solution."""
    name = rng.choice(["Ann", "Ben", "Eva", "Max", "Lea", "Tom", "Ida", "Sam"])
    thing = rng.choice(["apples", "books", "coins", "tickets", "shells", "stamps", "pens", "cards"])
    boxes, in_box = rng.randint(12, 19), rng.randint(13, 39)
    bags, in_bag = rng.randint(6, 12), rng.randint(13, 39)
    first, second = boxes * in_box, bags * in_bag
    return {
        "problem": f"{name} has {boxes} boxes with {in_box} {thing} in each, and {bags} bags with "
                   f"{in_bag} {thing} in each. How many {thing} does {name} have in all?",
        "solution": f"{boxes} * {in_box} = {first}. {bags} * {in_bag} = {second}. "
                    f"{first} + {second} = {first + second}. "
                    f"The answer is \\boxed{{{first + second}}}.",
        "answer": str(first + second)}


# ==== Main ========================================================================================


def work(argv: list[str]) -> None:
    args = parse_args(argv)
    modes = {"evaluate": evaluate, "regrade": regrade, "plot": plot, "toy_table": toy_table,
             "teacher": teacher, "inspect": inspect, "premise": premise,
             "word_problems": word_problems}
    modes[args.mode](args)


def main(argv: list[str]) -> int:
    return ogls.guarded(work, argv)


if __name__ == "__main__":
    from eval import main  # one copy of this module, for ogls_sd.py's --toy as well

    sys.exit(main(sys.argv[1:]))

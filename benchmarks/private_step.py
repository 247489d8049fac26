"""What privacy costs: one private step beside an ordinary one, and beside other engines.

    python -m benchmarks.private_step --json FILE [--quick] [--case CASE ...]

A whole step is forward, backward, clipping, noise and fused AdamW, fp32, on one thread. Every arm
is a process of its own, and arms take turns, step by step; a ratio is the median over rounds of
the ratio to the ordinary step of the same round, in CPU seconds. Memory is the peak resident set
of one step, interpreter and libraries included. Physical batch = logical batch, in the
private step with the filler that gives every batch one shape.

The C library's allocator is the same for all arms: for times freed memory stays with the process
(the fastest setting for every arm, and the one our nodes use), for memory it goes back at once (so
that what is measured is what an arm holds, and not how its heap is fragmented).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from client.clipping.engines import FILLER, SingleBackward
from client.private_step import private_steps
from common.allocation import keep_freed_memory, return_freed_memory
from common.privacy.mechanism import Mechanism
from common.privacy.noise import Randomness

TOKENS, CLASSES, CLIP, SIGMA, WARM = 128, 5, 1.0, 1.0, 4
MEMORY, TIME = "memory", "time"
LARGE, SMALL = 64, 16
"""Records of a step; the small one is for arms that keep every record's gradient."""
MADE = LARGE + 1
"""And a filler: a private step has batches of constant shape."""
FITS = {"gpt2-tied": 32}
"""Records of a large step where 64 do not fit: their logits alone are 1.6 GB, five times over.
Peers, which hold every record's gradient as well, take small steps only."""
PEERS = ["plain", "coterie", "opacus-hooks", "opacus-ghost"]
"""Arms that take a large step in the memory of a laptop, all four alive at once."""
ROUNDS, QUICK_ROUNDS = 5, 3

Losses = Callable[[nn.Module, NDArray[np.int64]], Tensor]
"""(B,) losses of a model, possibly wrapped, on made records; the last one, `FILLER`, is padding."""
Step = Callable[[int], None]
"""One whole step on so many records."""


def minilm(*, lora: bool) -> tuple[nn.Module, Losses]:
    """MiniLM-L6 (22.7 M parameters) with a classification head."""
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    if lora:
        adapters = LoraConfig(
            r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        model = get_peft_model(model, adapters)
    inputs = {
        "input_ids": torch.randint(1000, 30000, (MADE, TOKENS)),
        "attention_mask": torch.ones(MADE, TOKENS, dtype=torch.long),
        "token_type_ids": torch.zeros(MADE, TOKENS, dtype=torch.long),
        # Opacus's hooks are silently wrong without; the same for every arm.
        "position_ids": torch.arange(TOKENS).repeat(MADE, 1),
    }
    inputs["attention_mask"][FILLER, 1:] = 0
    labels = torch.arange(MADE) % CLASSES

    def losses(wrapped: nn.Module, at: NDArray[np.int64]) -> Tensor:
        logits = wrapped(**{name: t[at] for name, t in inputs.items()}).logits
        return functional.cross_entropy(logits, labels[at], reduction="none")

    return model, losses


def gpt2() -> tuple[nn.Module, Losses]:
    """GPT-2 of 6 layers and width 384, input and output embedding tied (30 M parameters)."""
    config = transformers.GPT2Config(
        n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    ids = torch.randint(0, config.vocab_size, (MADE, TOKENS))
    positions = torch.arange(TOKENS).repeat(MADE, 1)

    def losses(wrapped: nn.Module, at: NDArray[np.int64]) -> Tensor:
        logits = wrapped(input_ids=ids[at], position_ids=positions[at]).logits
        flat = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[at, 1:].flatten(), reduction="none"
        )
        return flat.view(len(at), -1).mean(1)

    return transformers.GPT2LMHeadModel(config), losses


def vit() -> tuple[nn.Module, Losses]:
    """ViT-tiny: 12 layers of width 192 on 32 x 32 pixels in patches of 4 (5.4 M parameters)."""
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=4,
        num_labels=CLASSES,
    )
    pixels, labels = torch.randn(MADE, 3, 32, 32), torch.arange(MADE) % CLASSES

    def losses(wrapped: nn.Module, at: NDArray[np.int64]) -> Tensor:
        logits = wrapped(pixel_values=pixels[at]).logits
        return functional.cross_entropy(logits, labels[at], reduction="none")

    return transformers.ViTForImageClassification(config), losses


CASES: dict[str, Callable[[], tuple[nn.Module, Losses]]] = {
    "minilm-full": lambda: minilm(lora=False),
    "minilm-lora": lambda: minilm(lora=True),
    "gpt2-tied": gpt2,
    "vit-tiny": vit,
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What every arm updates with."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-5, fused=True)


def plain(model: nn.Module, losses: Losses) -> Step:
    """Ordinary training."""
    optimizer = adamw(model)

    def step(records: int) -> None:
        losses(model, np.arange(records)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def coterie(model: nn.Module, losses: Losses) -> Step:
    """Our private step, meters on; a model that reads a mask has a filler in its batch."""
    engine, optimizer = SingleBackward(model), adamw(model)
    fillers = int(getattr(model, "base_model", model).config.model_type == "bert")

    def step(records: int) -> None:
        private_steps(
            engine,
            optimizer,
            lambda at: losses(model, at),
            mechanism=Mechanism(SIGMA, CLIP, 1.0, records),
            randomness=Randomness.from_entropy(),
            records=records,
            steps=1,
            physical_batch=records + fillers,
            fillers=fillers,
        )

    return step


def opacus_hooks(model: nn.Module, losses: Losses, *, functorch: bool = False) -> Step:
    """Opacus's per-record gradients, by layer rules or by functorch."""
    wrapped = GradSampleModule(model, loss_reduction="mean", force_functorch=functorch)
    optimizer = DPOptimizer(
        adamw(model), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=SMALL
    )

    def step(records: int) -> None:
        losses(wrapped, np.arange(records)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def opacus_ghost(model: nn.Module, losses: Losses) -> Step:
    """Opacus's ghost clipping: two backward passes."""
    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        adamw(model), noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=SMALL
    )

    def step(records: int) -> None:
        per_record = losses(wrapped, np.arange(records))
        DPTensorFastGradientClipping(wrapped, optimizer, per_record, "mean").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


ARMS: dict[str, Callable[[nn.Module, Losses], Step]] = {
    "plain": plain,
    "coterie": coterie,
    "opacus-hooks": opacus_hooks,
    "opacus-ghost": opacus_ghost,
    "opacus-functorch": lambda model, losses: opacus_hooks(model, losses, functorch=True),
}


@dataclass(frozen=True)
class Row:
    """One arm of one case."""

    case: str
    arm: str
    batch: int
    step_cpu_s: float
    time_ratio: float
    memory_ratio: float
    rounds: int


def main() -> None:
    """Measures, prints a table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="plain and coterie, three rounds")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    rows: list[Row] = []
    for case in options.case:
        arms = PEERS[:2] if options.quick or case in FITS else PEERS
        rows += measure(case, arms, FITS.get(case, LARGE), rounds)
        if not options.quick:
            rows += measure(case, list(ARMS), SMALL, rounds)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(case: str, arms: list[str], batch: int, rounds: int) -> list[Row]:
    """Steps of the arms in turn, a process each; an arm that fails is said and left out."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    workers: dict[str, Connection] = {}
    for arm in arms:
        ours, theirs = fork.Pipe()
        fork.Process(target=_serve, args=(theirs, case, arm), daemon=True).start()
        theirs.close()
        workers[arm] = ours
    peaks: dict[str, float] = {}
    for arm in arms:
        problem = _ask(workers[arm], MEMORY, WARM)
        answer = problem if isinstance(problem, str) else _ask(workers[arm], MEMORY, batch)
        if isinstance(answer, str):
            print(f"{case:12} {arm:16} does not run: {answer}", flush=True)
            del workers[arm]
        else:
            peaks[arm] = answer
    for arm, worker in list(workers.items()):
        problem = _ask(worker, TIME, batch)  # grows the heap that the timed steps find
        if isinstance(problem, str):
            print(f"{case:12} {arm:16} does not run: {problem}", flush=True)
            del workers[arm]
    times: dict[str, list[float]] = {arm: [] for arm in workers}
    for _ in range(rounds):
        for arm, worker in workers.items():
            seconds = _ask(worker, TIME, batch)
            assert not isinstance(seconds, str), seconds
            times[arm].append(seconds)
    for worker in workers.values():
        worker.send(None)
    rows = [_row(case, arm, batch, times, peaks) for arm in workers]
    for row in rows:
        print(
            f"{row.case:12} {row.arm:16} batch {row.batch:2}  {row.step_cpu_s:7.3f} s  "
            f"time x{row.time_ratio:.3f}  memory x{row.memory_ratio:.3f}  ({row.rounds} rounds)",
            flush=True,
        )
    return rows


def _row(
    case: str, arm: str, batch: int, times: dict[str, list[float]], peaks: dict[str, float]
) -> Row:
    ratios = [mine / base for mine, base in zip(times[arm], times["plain"], strict=True)]
    return Row(
        case,
        arm,
        batch,
        round(statistics.median(times[arm]), 4),
        round(statistics.median(ratios), 4),
        round(peaks[arm] / peaks["plain"], 4),
        len(ratios),
    )


def _ask(worker: Connection, what: str, records: int) -> float | str:
    """CPU seconds or peak MB of one step, or why it failed."""
    worker.send((what, records))
    try:
        answer: float | str = worker.recv()
    except EOFError:
        return "its process ended (out of memory?)"
    return answer


def _serve(parent: Connection, case: str, arm: str) -> None:
    """One arm's process: takes steps when asked."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        model, losses = CASES[case]()
        model.train()  # every rate of dropout is zero; Opacus's hooks need it
        step = ARMS[arm](model, losses)
        while (asked := parent.recv()) is not None:
            what, records = asked
            (return_freed_memory if what == MEMORY else keep_freed_memory)()
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            start = time.process_time()
            step(records)
            seconds = time.process_time() - start
            parent.send(_peak_mb() if what == MEMORY else seconds)
    except Exception as error:  # whatever a peer's engine raises is its result
        parent.send(f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")


def _peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()

"""Generation throughput, one stream and a batch of 64, against transformers T5 and x-transformers.

    python benchmarks/generate_throughput.py

Every system samples the same number of tokens after the same sources, at temperature 1 from all of the distribution
(no top-k), with its key/value cache; weights are random, in fp32 and in bf16; of a peer's ways of attention the faster
one counts, and for one stream of one thread and as many as there are. All of it takes turns in one process; a system
counts by the median of its rounds in its better precision.
"ours, --mode generate" is the command itself with its defaults: read a model file, write decoded text character by
character; what is timed is the writing, from the prompt to the last character. Peers attend to all they have written;
ours slides (source_length and target_length). Rows that name the default model have the sizes that training takes on a
CPU unless told otherwise, all others the shape above the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as --mode generate sets it; numpy reads it when torch imports it

import torch
from torch import Tensor, nn

import train_transformer
from benchmarks.machine import PRECISIONS, Contender, Measure, Result, compete, describe_machine, markdown_table, timed
from benchmarks.peers import Peer, Shape, add_shape_arguments, count_parameters, installed_peers, shape_of
from charseq2seq.checkpoint import save_checkpoint
from charseq2seq.console import run
from charseq2seq.device import torch_dtype
from charseq2seq.options import SIZES
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Transformer
from tests.push_client import tiny_checkpoint

# The command's row has no choice of precision.
AS_IT_IS = "as it is"
FIRST_CHARACTER = 0x100


def our_model(shape: Shape) -> Transformer:
    """Our model with random weights; fresh from the constructor many are zero."""
    model = Transformer(**shape.model())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return model.eval()


def write_measure(write: Callable[[Tensor, int], Tensor], sources: Tensor, num_tokens: int, threads: int) -> Measure:
    """Seconds for writing so many tokens after every source."""

    def work() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            ids = write(sources, num_tokens)
        assert ids.shape == (len(sources), num_tokens), ids.shape

    return timed(work)


def precision_measures(
    builds: Iterable[Callable[[], nn.Module]], method: str, sources: Tensor, num_tokens: int
) -> dict[str, tuple[Measure, ...]]:
    """Fresh models in every precision; a single stream may be faster without the help of other threads."""
    threads = {torch.get_num_threads()} | ({1} if len(sources) == 1 else set())

    def measures(build: Callable[[], nn.Module], precision: str) -> list[Measure]:
        write = getattr(build().eval().to(torch_dtype(precision)), method)
        return [write_measure(write, sources, num_tokens, number) for number in threads]

    return {precision: tuple(m for build in builds for m in measures(build, precision)) for precision in PRECISIONS}


def our_contender(name: str, shape: Shape, sources: Tensor, num_tokens: int) -> Contender:
    """`Transformer.generate` in both precisions."""
    seconds = precision_measures([lambda: our_model(shape)], "generate", sources, num_tokens)
    return Contender(f"**{name}**", count_parameters(our_model(shape)), False, seconds)


def peer_contender(peer: Peer, shape: Shape, sources: Tensor, num_tokens: int) -> Contender:
    """A peer in both precisions and every way it has, with positions for all that it is to write."""
    longer = dataclasses.replace(shape, target_length=num_tokens + 1)
    builds = [partial(build, longer) for build in peer.builds]
    seconds = precision_measures(builds, "write", sources, num_tokens)
    return Contender(str(peer), count_parameters(builds[0]()), True, seconds)


class TimedOutput(io.StringIO):
    """A stdout that notes when it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, text: str) -> int:
        """Note the time, keep the text."""
        self.times.append(time.perf_counter())
        return super().write(text)


def command_contender(name: str, shape: Shape, source: Tensor, num_tokens: int, folder: Path) -> Contender:
    """`train_transformer.py --mode generate`, run in this process; the folder is for its model."""
    vocabulary = CharVocabulary(map(chr, range(FIRST_CHARACTER, FIRST_CHARACTER + shape.vocab_size - 1)))
    model_path, prompt = folder / f"{name}.pth", vocabulary.decode(source[0].tolist())
    model = our_model(shape)
    checkpoint = dataclasses.replace(
        tiny_checkpoint(),
        model_state_dict=model.state_dict(),
        config=shape.model(),
        vocab=vocabulary.index_of_token(),
    )
    save_checkpoint(model_path, checkpoint)
    command = ["--mode", "generate", "--model_path", str(model_path), "--prompt", prompt]
    command += ["--num_chars", str(num_tokens), "--temperature", "1"]

    def seconds() -> float:
        threads = torch.get_num_threads()
        with contextlib.redirect_stdout(TimedOutput()) as output:
            assert train_transformer.main(command) == 0
        torch.set_num_threads(threads)  # which the command has changed
        assert len(output.getvalue()) == len(prompt) + num_tokens + 1
        return output.times[-1] - output.times[0]

    return Contender(f"**{name}, --mode generate**", count_parameters(model), False, {AS_IT_IS: (seconds,)})


def table(results: Sequence[Result]) -> str:
    """One row a system, one column a peer to compare with."""
    peers = [result for result in results if result.contender.is_peer]
    header = ["system", "parameters", *PRECISIONS, AS_IT_IS, "fastest"]
    header += [f"× {peer.contender.name}" for peer in peers]
    rows = (
        [
            result.contender.name,
            f"{result.contender.parameters:,}",
            *(f"{result.medians[name]:,.0f}" if name in result.medians else "" for name in (*PRECISIONS, AS_IT_IS)),
            f"{result.fastest:,.0f}",
            *(f"{result.best / peer.best:.2f}" for peer in peers),
        ]
        for result in results
    )
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table for one stream and one for a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of every system (%(default)s)")
    parser.add_argument("--num_tokens", type=int, default=256, metavar="N", help="to write, each stream (%(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], metavar="N", help="(default: 1 64)")
    add_shape_arguments(parser)
    args = parser.parse_args(argv)
    shape = shape_of(args)
    machine = describe_machine()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    ours = {"ours": shape, "ours, default model": dataclasses.replace(shape, **SIZES["tiny"])}
    peers = [peer for peer in installed_peers() if peer.writes]
    print(
        f"Generation, characters per second, median of {args.rounds} interleaved rounds of {args.num_tokens} new tokens"
    )
    print(f"a stream at temperature 1. Shape: {shape}.")
    for streams in args.streams:
        sources, _ = dataclasses.replace(shape, batch_size=streams).random_batch()
        contenders = [our_contender(name, sizes, sources, args.num_tokens) for name, sizes in ours.items()]
        with tempfile.TemporaryDirectory() as folder:
            if streams == 1:
                contenders += [
                    command_contender(name, sizes, sources, args.num_tokens, Path(folder))
                    for name, sizes in ours.items()
                ]
            contenders += [peer_contender(peer, shape, sources, args.num_tokens) for peer in peers]
            results, _ = compete(contenders, streams * args.num_tokens, args.rounds)
        print(f"\n{'One stream' if streams == 1 else f'Batch of {streams}'}:\n")
        print(table(results))
    print(f"\n{machine}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

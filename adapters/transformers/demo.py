"""``lmkv demo``: a real language model answers questions about long documents, cold and with its KV kept.

Three rounds ask another question about each document: ``cold`` reads them for the first time, ``ram`` finds their KV in RAM,
``disk`` is a new process that finds it on disk. Every answer is computed once more by plain ``model.generate`` and has to be
the same, token for token. Times are from handing over the token ids to the first new token, everything included; new KV is
stored after the last token of an answer and has reached the disk before the next question is asked. What is being done is said
on standard error, a line a step; standard output is the report's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .demo_model import DemoError, LoadedModel, import_libraries, load, prepare
from .demo_texts import check_folder

if TYPE_CHECKING:
    from .demo_report import Summary
    from .demo_rounds import Request
    from .demo_texts import Document
    from .reuse import KVReuse

__all__ = ["main"]

_PROGRAM = "lmkv demo"
_ROUNDS = ("cold", "ram", "disk")
_PLOT = "lmkv-demo.png"
#: What a run with defaults takes is to be short; this one shows more of what is gained.
_LONG = f"{_PROGRAM} --documents 4 --document-tokens 2900 --max-new-tokens 24"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DemoError(f"{message} ({_PROGRAM} --help lists all options)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 1 if an answer differs, a warm round hit nothing or something is missing; 2 for wrong arguments.
    """
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except DemoError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    # before torch is loaded: threads that spin while they wait make a busy machine several times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if args.one_round:
            _answer_rounds(args, [args.one_round], _Listener(_tell_request, _tell_line, lambda documents: None))
            return 0
        return _demo(args)
    except DemoError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("lmkv"):
            raise
        print(f"{_PROGRAM}: needs the package {error.name!r}: pip install 'lmkv[demo]'", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 1


# Arguments


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog=_PROGRAM,
        description="A real language model answers questions about long documents, cold and cached.",
        epilog=f"More and longer texts, from which more is gained, in about four minutes on two cores: {_LONG}",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="PATH_OR_HUB_ID",
        help="directory, .gguf file or Hub id (default: the packaged SmolLM2-135M-Instruct)",
    )
    add("--docs", metavar="DIR", help="directory of .txt, .md or .rst files (default: chapters of Python's manual)")
    add("--documents", metavar="N", type=_at_least_one, help="read at most N of them (default: 2 chapters, all files)")
    add(
        "--document-tokens",
        metavar="N",
        type=_at_least_one,
        help="read at most N tokens of each (default: 1200 of a chapter; of a file, what the model can read)",
    )
    add("--rounds", metavar="LIST", type=_rounds, default="cold,ram,disk", help="some of cold,ram,disk (default: all three)")
    add("--max-new-tokens", metavar="N", type=_at_least_one, default=12, help="length of an answer (default: 12)")
    add("--cache-dir", metavar="DIR", help="keep the KV there (default: a temporary directory)")
    add("--plot", metavar="FILE", help=f"write the bars as PNG there (default: {_PLOT}, none with --json)")
    add("--json", action="store_true", help="print one JSON object a request and a summary, and nothing else, on stdout")
    add("--threads", metavar="N", type=_at_least_one, help="threads that compute (default: torch's choice)")
    add("--one-round", choices=_ROUNDS, help=argparse.SUPPRESS)  # what the new process is started with
    args = parser.parse_args(argv)
    if not args.cache_dir and args.rounds[0] != "cold":
        raise DemoError(f"--rounds {','.join(args.rounds)}: expected cold first, or the --cache-dir of an earlier run")
    if "ram" in args.rounds and "cold" not in args.rounds:
        raise DemoError(f"--rounds {','.join(args.rounds)}: expected cold before ram, since RAM is empty at the start")
    return args


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return int(text)


def _rounds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if [name for name in _ROUNDS if name in names] != names:
        raise argparse.ArgumentTypeError(f"expected some of cold,ram,disk, in this order; got {text!r}")
    return names


# The run


@dataclasses.dataclass(frozen=True)
class _Listener:
    """Who is told what rounds come to.

    Args:
        request: gets each answered question.
        say: gets each step, a line of text.
        documents: gets how many documents there are, once they have been read.
    """

    request: Callable[[Request], None]
    say: Callable[[str], None]
    documents: Callable[[int], None]


def _demo(args: argparse.Namespace) -> int:
    from .demo_progress import Progress

    check_folder(args.docs)
    requests: list[Request] = []
    with contextlib.ExitStack() as stack:
        if not args.cache_dir:
            args.cache_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="lmkv-demo-"))
        progress = stack.enter_context(Progress())

        def report(request: Request) -> None:
            requests.append(request)
            progress.advance()
            if args.json:
                _print_json(dataclasses.asdict(request))

        listener = _Listener(report, progress.say, lambda documents: progress.expect(documents * len(args.rounds)))
        args.model = prepare(args.model, progress.say)
        begin = time.perf_counter()
        load_seconds = 0.0
        own = [name for name in args.rounds if name != "disk"]
        if own:
            load_seconds = _answer_rounds(args, own, listener)
        if "disk" in args.rounds:
            _answer_in_new_process(args, "disk", listener)
        seconds = time.perf_counter() - begin

    from .demo_report import summarize  # not before: it loads torch, which takes long and so is said before

    return _finish(args, requests, summarize(requests, load_seconds, seconds))


def _answer_rounds(args: argparse.Namespace, names: Sequence[str], listener: _Listener) -> float:
    """Run rounds in this process; returns the seconds that reading the model took. The store is closed at the end."""
    import_libraries(listener.say)
    import torch

    from .demo_rounds import run_round
    from .demo_texts import documents

    if args.threads:
        torch.set_num_threads(args.threads)
    listener.say(f"loading the model {Path(args.model).name}")
    loaded = load(args.model)
    context = getattr(loaded.model.config, "max_position_embeddings", 4096)
    limit = context - args.max_new_tokens - 256  # the chat template and a question fit into 256
    if limit < 256:
        raise DemoError(f"the model reads {context} tokens, too few for a document and {args.max_new_tokens} new tokens")
    texts = documents(args.docs, loaded.tokenizer, limit, args.documents, args.document_tokens)
    listener.documents(len(texts))
    listener.say(f"documents: {len(texts)}; opening the store")
    with _open_reuse(args, loaded, texts) as reuse:
        for name in names:
            title = f"round {args.rounds.index(name) + 1} of {len(args.rounds)} ({name})"
            run_round(name, title, reuse, loaded.tokenizer, texts, args.max_new_tokens, listener.request, listener.say)
    return loaded.seconds


def _open_reuse(args: argparse.Namespace, loaded: LoadedModel, texts: Sequence[Document]) -> KVReuse:
    """A store that holds all documents with their questions, in RAM and twice that on disk."""
    from ...config import StoreConfig
    from ...errors import LMKVError
    from .model import layout_of
    from .reuse import KVReuse

    try:
        layout = layout_of(loaded.model)
        chunks = sum(-(-len(loaded.tokenizer(text.text).input_ids) // layout.chunk_tokens) + 4 for text in texts)
        capacity = max(chunks * layout.chunk_bytes, 256 * 1024**2)
        config = StoreConfig(
            model=Path(args.model).name, disk_path=args.cache_dir, ram_capacity=capacity, disk_capacity=2 * capacity
        )
        return KVReuse.open(loaded.model, config)
    except LMKVError as error:
        raise DemoError(str(error)) from error


def _answer_in_new_process(args: argparse.Namespace, name: str, listener: _Listener) -> None:
    """Run a round in another process, which tells what it does in lines of JSON."""
    import_libraries(listener.say)
    from .demo_rounds import Request

    listener.say(f"starting a new process for the round {name}")
    # not -m, which would look for the package in the current directory first, where a source tree may stand
    code = (
        f"import sys; sys.path[:] = filter(None, sys.path); from {__package__}.demo import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--one-round", name, "--rounds", ",".join(args.rounds)]
    for option in ("model", "docs", "documents", "document_tokens", "max_new_tokens", "cache_dir", "threads"):
        value = getattr(args, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                told = json.loads(line)
                if "say" in told:
                    listener.say(told["say"])
                else:
                    listener.request(Request(**told["request"]))
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        raise DemoError(f"the process of round {name} failed with exit status {child.returncode}")


def _tell_request(request: Request) -> None:
    _print_json({"request": dataclasses.asdict(request)})


def _tell_line(text: str) -> None:
    _print_json({"say": text})


def _finish(args: argparse.Namespace, requests: Sequence[Request], summary: Summary) -> int:
    from .demo_report import plot, print_report

    if args.json:
        _print_json({"summary": dataclasses.asdict(summary)})
    else:
        print_report(requests, summary)
    path = args.plot or (None if args.json else _PLOT)
    if path:
        try:
            plot(requests, Path(path))
        except OSError as error:
            print(f"{_PROGRAM}: no plot: {error}", file=sys.stderr)
        else:
            print(f"plot: {path}", file=sys.stderr if args.json else sys.stdout)
    if not summary.passed:
        print(f"{_PROGRAM}: an answer differed from the one without the cache, or a warm round hit nothing", file=sys.stderr)
    return 0 if summary.passed else 1


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())

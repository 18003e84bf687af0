"""The command line: ``python -m sparseflow env | report | bench | study``.

``report`` and ``bench`` take ``FILE.py:function``: a function without arguments that returns
``(model, example_input)``. Without one ``report`` uses a synthetic network, and says so, and ``bench`` runs its suites.
Exit code 0 on success, 1 when the outputs of ``bench`` differ, when a gate is red, a case or a training of ``study``
failed, 2 on an error (one line on the standard error output; ``--traceback`` shows its origin).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from . import api
from .bench import cli as suites
from .bench import compare, gpus
from .bench.synthetic import NOTE, synthetic_network
from .env import environment
from .errors import NothingAcceleratedWarning, SparseflowError
from .study import cli as study_cli

_REPEATS = 30


class SpecError(SparseflowError):
    """``FILE.py:function`` does not lead to a model and an example input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` defaults to the arguments of the process. Returns the exit code.

    >>> main(["report", "missing.py:build"])
    2
    """
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except Exception as error:
        if args.traceback:
            raise
        print(f"sparseflow {args.name}: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparseflow", description="Spiking networks, computed where they spike.")
    commands = parser.add_subparsers(dest="name", required=True)
    _add_command(commands, "env", _env, "print machine, engine and versions")
    report = _add_command(commands, "report", _report, "accelerate a model and print what runs where, and why")
    _add_model_arguments(report)
    report.add_argument("--html", type=Path, metavar="PATH", help="also write a self-contained HTML page")
    summary = "time a model dense and accelerated, in alternation; without a model, run the benchmark suites"
    bench = _add_command(commands, "bench", _bench, summary)
    _add_model_arguments(bench, without="the suites are run", backend=None)
    bench.add_argument("--repeats", type=_positive, help=f"alternations (default: {_REPEATS}; of suites 25, quick 3)")
    suites.add_arguments(bench)
    summary = "train a grid of spiking networks, count their spikes, measure and predict what they cost"
    study_cli.add_arguments(_add_command(commands, "study", study_cli.run, summary))
    return parser


def _add_command(commands: Any, name: str, run: Callable[..., int], summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(command=run)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    return command


def _add_model_arguments(
    command: argparse.ArgumentParser, without: str = "a synthetic network is used", backend: str | None = "auto"
) -> None:
    spec_help = f"function that returns (model, example_input); without it {without}"
    command.add_argument("spec", nargs="?", metavar="FILE.py:function", help=spec_help)
    command.add_argument("--threads", type=_positive, help="threads of PyTorch and of the native engine")
    device_help = (
        "cpu, cuda:N, or cuda for the idle GPU with the most free memory; default: where the model is, and the "
    )
    command.add_argument("--device", help=device_help + "idle GPU, if any, for the synthetic network")
    command.add_argument("--backend", default=backend, help="auto, cpu, torch or triton (default: auto)")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _env(args: argparse.Namespace) -> int:
    record = environment()
    print(json.dumps(record, indent=1) if args.json else "\n".join(f"{key:<13} {record[key]}" for key in record))
    return 0


def _report(args: argparse.Namespace) -> int:
    model = _accelerated(args)[0]
    report = api.report(model)
    print(report.to_json() if args.json else report)
    if args.html:
        print(f"wrote {report.to_html(args.html)}", file=sys.stderr)
    return 0


def _bench(args: argparse.Namespace) -> int:
    suites.check(args)
    if args.spec is None:
        return suites.run(args)
    model, example = _accelerated(args)
    result = compare(model, example, repeats=args.repeats or _REPEATS)
    record = {"result": result.to_dict(), "environment": environment()}
    print(json.dumps(record, indent=1) if args.json else f"{api.report(model).summary}\n{result}")
    return 0 if result.matches else 1


def _accelerated(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.spec is None:
        print(NOTE, file=sys.stderr)
        model, example = synthetic_network()
    else:
        model, example = load_spec(args.spec)
    device = _device(args)
    if device is not None:
        model, example = model.to(device), tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), example)
    with warnings.catch_warnings():
        # The summary, which both commands print, says the same.
        warnings.simplefilter("ignore", NothingAcceleratedWarning)
        return api.accelerate(model, example, backend=args.backend or "auto"), example


def _device(args: argparse.Namespace) -> torch.device | None:
    """The device asked for; ``None`` where the model is to stay where it is."""
    picks = args.device == "cuda" or (args.device is None and args.spec is None and torch.cuda.is_available())
    if picks:
        return torch.device("cuda", gpus.pick(gpus.visible()))
    return None if args.device is None else torch.device(args.device)


def load_spec(spec: str) -> tuple[nn.Module, Any]:
    """Call the function named by ``FILE.py:function``. Raises :class:`SpecError` when that is not possible."""
    file, _, name = spec.rpartition(":")
    if not file or not name.isidentifier():
        raise SpecError(f"expected FILE.py:function, got {spec!r}")
    if not Path(file).is_file():
        raise SpecError(f"there is no file {file}")
    build = getattr(_import_file(Path(file)), name, None)
    if not callable(build):
        raise SpecError(f"{file} has no function {name!r}")
    result = build()
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)):
        raise SpecError(f"{spec} must return (torch.nn.Module, example_input), got {type(result).__name__}")
    return result


def _import_file(path: Path) -> ModuleType:
    # runpy would throw the module away, and classes of a model that is pickled or copied must stay importable.
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise SpecError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    found.loader.exec_module(module)
    return module


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, SparseflowError) else f"{type(error).__name__}: {text}"

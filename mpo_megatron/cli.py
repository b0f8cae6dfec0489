"""`mpo <command>`: one function per stage, thin over the package."""

from __future__ import annotations

import argparse
import difflib
import errno
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mpo_megatron
from mpo_megatron import starting
from mpo_megatron.config import (
    AlignConfig,
    ChatConfig,
    ConfigError,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    InspectConfig,
    IterateConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    parse,
    require,
    validate_convert,
    validate_unused,
)
from mpo_megatron.config.values import WHOLE, show
from mpo_megatron.files import DataError
from mpo_megatron.files.partial import clear_leftovers
from mpo_megatron.terminal import next_command
from mpo_megatron.terminal.interruption import StageError, interruptible, say_interrupted
from mpo_megatron.terminal.next_command import say_next
from mpo_megatron.terminal.output import outlive_readers
from mpo_megatron.terminal.visible import message, visible


def align(arguments: Sequence[str]) -> int:
    """Align a Hugging Face model with groups or prompts: all stages with one command."""
    config = parse(AlignConfig, arguments, "mpo align")
    from mpo_megatron.align.align import align as run

    run(config)
    return 0


def chat(arguments: Sequence[str]) -> int:
    """Talk to a model in the terminal, or to two side by side: `mpo chat MODEL --beside BASE`."""
    named = ["--model", arguments[0]] if arguments and not arguments[0].startswith("-") else []
    config = parse(ChatConfig, [*named, *arguments[len(named[1:]) :]], "mpo chat")
    from mpo_megatron.rollout.chat import chat as run

    run(config)
    return 0


def convert(arguments: Sequence[str]) -> int:
    """Convert a Hugging Face checkpoint to a Megatron checkpoint, or back."""
    config = parse(ConvertConfig, arguments, "mpo convert")
    clear_leftovers(Path(config.output).resolve())  # even if the output is refused because it is complete
    validate_convert(config)  # repeated below; reports a wrong path before slow imports
    from mpo_megatron.model.convert import convert as run

    run(config)
    say_next(next_command.after_convert(config.output))
    return 0


def prepare(arguments: Sequence[str]) -> int:
    """Tokenize prompts with K responses and rewards into groups."""
    config = parse(PrepareConfig, arguments, "mpo prepare")
    from mpo_megatron.data.prepare import prepare as run

    run(config)
    say_next(next_command.after_prepare(config.output, config.tokenizer))
    return 0


def generate(arguments: Sequence[str]) -> int:
    """Sample K responses per prompt with transformers, vLLM or an OpenAI-compatible server."""
    config = parse(GenerateConfig, arguments, "mpo generate")
    from mpo_megatron.rollout.generate import generate as run

    run(config)
    if (Path(config.output) / "generate.json").is_file():  # otherwise other shards are still running
        say_next(next_command.after_generate(config.output))
    return 0


def score(arguments: Sequence[str]) -> int:
    """Score responses: reward models, rankers, verifiable rewards, judges."""
    config = parse(ScoreConfig, arguments, "mpo score")
    from mpo_megatron.rollout.score import score as run

    run(config)
    if (Path(config.output) / "score.json").is_file():
        say_next(next_command.after_score(config.output))
    return 0


def select(arguments: Sequence[str]) -> int:
    """Select the groups, responses and sets to train on."""
    config = parse(SelectConfig, arguments, "mpo select")
    from mpo_megatron.rollout.select import select as run

    run(config)
    say_next(next_command.after_select(config.output))
    return 0


def reference(arguments: Sequence[str]) -> int:
    """Compute reference log-probs of prepared groups, once for all runs; takes the options of `mpo train`."""
    return _start_ranks("reference", "mpo_megatron.train.reference_main", arguments)


def train(arguments: Sequence[str]) -> int:
    """Train on this machine's ranks; for several machines, see `mpo launch`."""
    return _start_ranks("train", "mpo_megatron.train", arguments)


def launch(arguments: Sequence[str]) -> int:
    """Write and submit a job: `mpo launch torchrun | slurm | slurm-array | kubernetes | skypilot`; --dry_run only prints it."""
    from mpo_megatron.launch.launch import TARGETS
    from mpo_megatron.launch.launch import launch as run

    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {(kind.__doc__ or '').partition(': ')[2]}" for name, kind in TARGETS.items()]
        print("usage: mpo launch <target> [--config FILE] [--field value …]\n\n" + "\n".join(lines))
        print("\n`mpo launch <target> --help` lists its options.")
        return 0
    if arguments[0] not in TARGETS:
        raise ConfigError(f"name where the job runs: mpo launch {' | '.join(TARGETS)}, with --help for its options.")
    target, *options = arguments
    return run(parse(TARGETS[target], options, f"mpo launch {target}"))


def iterate(arguments: Sequence[str]) -> int:
    """Run on-policy rounds of generate, score, select, prepare and train; repeat the command to resume."""
    config = parse(IterateConfig, arguments, "mpo iterate")
    from mpo_megatron.rollout.iterate import iterate as run

    run(config)
    say_next(next_command.after_iterate(config.output, config.rounds))
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """Show a group, or a packed row of a run's step, token by token as the model sees it."""
    config = parse(InspectConfig, arguments, "mpo inspect")
    from mpo_megatron.viewer.inspect import inspect as run

    run(config)
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write a page with curves, distributions and held-out groups: `mpo report RUN [RUN2 …] --output report.html`."""
    folders = list(itertools.takewhile(lambda argument: not argument.startswith("--"), arguments))
    named = [f"--runs={json.dumps(folders)}"] if folders else []
    config = parse(ReportConfig, [*named, *arguments[len(folders) :]], "mpo report")
    from mpo_megatron.report.report import report as run

    run(config)
    say_next(next_command.after_report(config.output, config.runs))
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """Measure held-out groups, sampled reward and win rate; write answers to AlpacaEval, Arena-Hard and MT-Bench."""
    launcher, own = _read_launcher("evaluate", arguments)
    config = parse(EvaluateConfig, own, "mpo evaluate", launcher.helps)
    from mpo_megatron.evaluate.evaluate import evaluate as run

    run(config, launcher.nproc)
    say_next(next_command.after_evaluate(config.output))
    return 0


def plan(arguments: Sequence[str]) -> int:
    """Estimate memory, communication and time of a run, and find the best layouts."""
    config = parse(PlanConfig, arguments, "mpo plan")
    from mpo_megatron.plan.plan import plan as run

    run(config)
    say_next(next_command.after_plan(config.train, config.gpus, config.gpus_per_node))
    return 0


def losses(arguments: Sequence[str]) -> int:
    """List every loss with its hyper-parameters, needs and source."""
    from mpo_megatron.losses.table import print_losses

    print_losses(arguments)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """Check what is installed, whether it works together, and what a run would use; name a fix for each problem."""
    from mpo_megatron.doctor.options import read_options

    options = read_options(arguments)
    from mpo_megatron.doctor.doctor import doctor as run

    return run(options.config, as_json=options.json)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "align": align,
    "convert": convert,
    "prepare": prepare,
    "generate": generate,
    "score": score,
    "select": select,
    "reference": reference,
    "train": train,
    "iterate": iterate,
    "evaluate": evaluate,
    "chat": chat,
    "launch": launch,
    "inspect": inspect,
    "report": report,
    "plan": plan,
    "losses": losses,
    "doctor": doctor,
}


OUTLIVES_READERS = ("align", "convert", "prepare", "generate", "score", "select", "reference", "train", "iterate", "evaluate")
"""Commands that continue when their output has no reader, as after `mpo train | head`."""

OUTSIDE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to use it, or name another path"),
    errno.EROFS: "name a path on a disk that can be written to",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space, and run the same command again"),
    errno.ENAMETOOLONG: "shorten it: most file systems allow 255 bytes a name, and 4,095 a path",
}
"""File errors caused by the machine that no check predicts, and what to do."""


SPINS = 3000
"""Spin iterations of an OpenMP thread before it sleeps. With GNU's default, 300,000, generation on two busy cores takes up to
five times as long; on an idle machine there is no difference."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named by the first argument; print a message instead of a traceback for errors that a user can fix."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))  # read once, when torch is imported
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        starting.before_exit()
        sys.stdout.flush()  # here, to distinguish a closed reader (`mpo losses | head`) from other errors
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        return 128 + signal.SIGPIPE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"mpo_megatron {mpo_megatron.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=2)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        print(f"mpo: there is no command {name!r}; {meant}`mpo --help` lists them.", file=sys.stderr)
        return 2
    if name in OUTLIVES_READERS:
        outlive_readers()
    try:
        with interruptible():
            return COMMANDS[name](rest)
    except (ConfigError, DataError) as error:
        print(f"mpo {name}: {message(error)}", file=sys.stderr)
        return 2
    except StageError as error:
        print(f"mpo {name}: {message(error)}", file=sys.stderr, flush=True)
        return error.status
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        what = message(visible(error.filename or "a file"))
        print(f"mpo {name}: {what}: {error.strerror}; {OUTSIDE[error.errno]}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return say_interrupted(name, error)


def _start_ranks(name: str, module: str, arguments: Sequence[str]) -> int:
    """Check a training configuration, then start this machine's ranks of a module through torchrun."""
    launcher, own = _read_launcher(name, arguments, restarts=True)
    config = parse(TrainConfig, own, f"mpo {name}", launcher.helps)
    validate_unused(config)
    from mpo_megatron.train.setup import build_setup, check_contrasts

    # Every rank checks too; here one message appears before any rank starts.
    setup = build_setup(config, launcher.nproc, resumes=name == "train")
    if name == "train":
        from mpo_megatron.train.checkpoints.resumption import check_resumption

        check_resumption(setup)
        check_contrasts(setup)
    from mpo_megatron.train.launcher import launch as start

    code = start(module, own, num_ranks=setup.num_ranks, max_restarts=launcher.max_restarts)
    if code == 0 and config.stop_after is None:
        say_next(next_command.after_train(config.output) if name == "train" else next_command.after_reference(arguments))
    return code


NPROC = "Number of ranks; by default one per GPU, or what the layout needs."
MAX_RESTARTS = "Restart all ranks this many times when one fails (default 0)."


def _read_launcher(name: str, arguments: Sequence[str], *, restarts: bool = False) -> tuple[argparse.Namespace, list[str]]:
    """Return the options about this machine's ranks, with `helps` (option → help), and all other arguments.

    Raises:
        ConfigError: an invalid value.
    """
    helps = {"--nproc": NPROC, **({"--max_restarts": MAX_RESTARTS} if restarts else {})}
    parser = argparse.ArgumentParser(prog=f"mpo {name}", add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in helps:
        parser.add_argument(option, type=_read_whole, default=0 if option == "--max_restarts" else None)
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}; it must be a whole number.") from error
    for option, least in (("nproc", 1), ("max_restarts", 0)):
        value = getattr(options, option, None)
        require(value is None or value >= least, f"--{option} = {value}; it must be at least {least}.")
    options.helps = helps
    return options, others


def _read_whole(text: str) -> int:
    """The number spelled by ASCII digits; Python's `int` also accepts 1_000 and other scripts' digits."""
    if WHOLE.fullmatch(text) is None or len(text) > 9:
        raise argparse.ArgumentTypeError(show(text))
    return int(text)


def _usage() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').strip().splitlines()[0]}" for name, command in COMMANDS.items()]
    return (
        "usage: mpo <command> [--config FILE] [--field value …]\n\n"
        + "\n".join(lines)
        + "\n\n`mpo <command> --help` lists its options."
    )


if __name__ == "__main__":
    sys.exit(main())

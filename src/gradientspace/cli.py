"""The command line: parse, call, print. Heavy imports happen inside the commands, so `--help` answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from gradientspace import __version__, chat
from gradientspace.config import GradientSpaceConfig, load_config
from gradientspace.demo.skills import CONTROLS
from gradientspace.errors import ConfigError, GradientSpaceError, LostRankError
from gradientspace.export import ENGINES
from gradientspace.ranks import ranks
from gradientspace.serving import command as serving
from gradientspace.signals import Terminated, stoppable

_STEPS = {
    "warmup": "train the warm-up adapter",
    "cluster": "stream gradients into the clusterer",
    "experts": "train the shared adapter and one expert a cluster",
    "router": "train and calibrate the router",
    "eval": "train the baselines and evaluate every method",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `gradientspace` command. Returns the exit code: 0 done, 2 wrong input, 1 our fault,
    130 interrupted, 143 terminated.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unknown option {rest[0]!r}; see gradientspace {options.command or ''} --help")
    if options.command is None:
        parser.print_help()
        return 0
    try:
        here = ranks()
        if here.rank > 0:
            from gradientspace.distributed import serve

            return serve()
        with stoppable(), here.leading():
            return options.handler(options, rest) or 0
    except LostRankError as error:
        if not error.told:
            print(f"gradientspace: error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)  # an orderly end might wait for messages that nobody will take any more
    except GradientSpaceError as error:
        if options.debug:
            traceback.print_exc()
        print(f"gradientspace: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Terminated:
        print("\ngradientspace: terminated; the same command continues where it stopped", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("\ngradientspace: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong with the run.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"gradientspace: internal error: {text} (run again with --debug and report it)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradientspace",
        description="Cluster an instruction mix by gradient, train one LoRA expert a cluster, route every prompt.",
    )
    parser.add_argument("--version", action="version", version=f"gradientspace {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser("run", help="run the whole method on a config; resumes", add_help=False)
    run.add_argument("config", nargs="?")
    run.add_argument("-h", "--help", action="store_true")
    run.add_argument("--dry-run", action="store_true")
    run.set_defaults(handler=_run, takes_overrides=True)

    data = commands.add_parser("data", help="show what becomes of every row, before any model is loaded")
    data.add_argument("config")
    data.set_defaults(handler=_data, takes_overrides=True)

    for name, text in _STEPS.items():
        step = commands.add_parser(name, help=f"one step on a run folder or a config: {text}")
        step.add_argument("run", help="a run folder, or a config that makes one")
        step.add_argument("--redo", action="store_true", help="make this step again though it is there")
        step.set_defaults(handler=_step, takes_overrides=True)
        if name == "cluster":
            _add_recluster_options(step)

    report = commands.add_parser("report", help="remake report.html from a run's files, or lay runs side by side")
    report.add_argument("run", nargs="?", help="a run folder (files only, seconds), or a config to run first")
    report.add_argument("--compare", nargs="+", metavar="RUN", help="run folders for one page, side by side")
    report.add_argument("--output", type=Path, default=Path("compare.html"), help="where --compare writes its page")
    report.set_defaults(handler=_report, takes_overrides=True)

    diagnose = commands.add_parser("diagnose", help="should this mix be split at all? minutes, before any expert")
    diagnose.add_argument("config")
    diagnose.set_defaults(handler=_diagnose, takes_overrides=True)

    inspect = commands.add_parser("inspect", help="samples of a run by cluster, boundary, source or text; export them")
    inspect.add_argument("run")
    inspect.add_argument("--cluster", type=int, help="only this cluster; -1: samples without one")
    inspect.add_argument("--boundary", action="store_true", help="only samples near a boundary, smallest margin first")
    inspect.add_argument("--source", help="only this source")
    inspect.add_argument("--text", help="only prompts that contain this, whatever the case")
    inspect.add_argument("--sort", choices=("margin", "cosine", "loss", "norm"))
    inspect.add_argument("--limit", type=int, default=10, help="samples shown (an export has them all)")
    inspect.add_argument("--export", type=Path, help="a .jsonl or .parquet file, or a new folder for datasets")
    inspect.set_defaults(handler=_inspect)

    route = commands.add_parser("route", help="which expert a prompt goes to, how sure, and the runner-up")
    route.add_argument("run")
    route.add_argument("prompt")
    route.add_argument("--json", action="store_true", help="print the decision as JSON")
    route.set_defaults(handler=_route)

    generate = commands.add_parser("generate", help="answer a prompt with the expert it is routed to")
    generate.add_argument("run")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.set_defaults(handler=_generate)

    talk = commands.add_parser("chat", help="a conversation in the terminal, with the expert that answers shown")
    chat.add_options(talk)
    talk.set_defaults(handler=chat.chat)

    serve = commands.add_parser("serve", help="an OpenAI-compatible server that routes every prompt to its expert")
    serving.add_options(serve)
    serve.set_defaults(handler=serving.serve)

    compare = commands.add_parser("compare", help="several runs or configs, every method, on one table")
    compare.add_argument("runs", nargs="+", metavar="RUN_OR_CONFIG")
    compare.add_argument("--seeds", type=int, help="run every config with this many seeds, from its own on")
    compare.add_argument("--split", choices=("test", "dev_b"), help="evaluate on this split: dev_b for choices")
    compare.add_argument("--against", default="single", help="method of the first run that differences are from")
    compare.add_argument("--json", type=Path, help="also write the table as JSON")
    compare.set_defaults(handler=_compare, takes_overrides=True)

    export = commands.add_parser("export", help="a folder that an inference engine serves the experts from")
    export.add_argument("run")
    export.add_argument("--engine", required=True, choices=ENGINES)
    export.add_argument("--output", type=Path, help="where to; default: export/ENGINE in the run folder")
    export.set_defaults(handler=_export)

    push = commands.add_parser("push", help="upload experts, router, cards and results to a model hub")
    push.add_argument("run")
    push.add_argument("repo_id", help="ORG/NAME")
    push.add_argument("--private", action="store_true", help="only you may see it")
    push.set_defaults(handler=_push)

    demo = commands.add_parser("demo", help="the whole method on generated data, offline, in minutes")
    demo.add_argument("--control", choices=CONTROLS, default="none")
    demo.add_argument("--output-dir", default="runs")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--fresh", action="store_true", help="start over instead of reusing a finished run")
    demo.set_defaults(handler=_demo)

    doctor = commands.add_parser("doctor", help="versions, devices, what is missing, and the fix")
    doctor.set_defaults(handler=_doctor)
    return parser


def _add_recluster_options(step: argparse.ArgumentParser) -> None:
    again = step.add_argument_group("cluster a finished run again from the coordinates it kept; takes seconds")
    again.add_argument("--k", type=int, help="another number of clusters")
    again.add_argument("--seed", type=int, help="another seed of the clustering")
    again.add_argument("--sweep", metavar="A..B", help="quality and stability for every K from A to B; changes nothing")
    again.add_argument("--json", type=Path, help="also write the sweep as JSON")
    again.add_argument("--csv", type=Path, help="also write the sweep as CSV")
    step.set_defaults(handler=_cluster)


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.help:
        _print_run_help()
        return
    if options.config is None:
        raise ConfigError("no config given: gradientspace run CONFIG.yaml [--section.option value ...]")
    if options.dry_run:
        from gradientspace.preflight import estimate, table

        print(table(estimate(load_config(options.config, overrides))))
        return
    from gradientspace.pipeline import run

    _print_summary(run(load_config(options.config, overrides)).path)


def _print_run_help() -> None:
    """Every option with its help; tyro renders the config's own docstrings."""
    import tyro

    print(
        "usage: gradientspace run CONFIG.yaml [--dry-run] [--section.option value ...]\n\n"
        "--dry-run prints what each stage will take of time, memory and disk, and stops.\n\n"
        "CONFIG.yaml holds the options below."
    )
    try:
        tyro.cli(
            GradientSpaceConfig, default=GradientSpaceConfig(), args=["--help"], config=(tyro.conf.FlagConversionOff,)
        )
    except SystemExit:
        return


def _step(options: argparse.Namespace, overrides: list[str]) -> None:
    from gradientspace.pipeline import STAGES_OF, run
    from gradientspace.run_folder import Run

    path = Path(options.run)
    config = Run.open(path).config if path.is_dir() and not overrides else load_config(options.run, overrides)
    if options.redo:
        Run.create(config.validate()).forget(*STAGES_OF[options.command])
    done = run(config, until=options.command)
    if options.command == "eval":
        _print_summary(done.path)


def _cluster(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.k is None and options.sweep is None and (options.seed is None or not Path(options.run).is_dir()):
        seed = [] if options.seed is None else ["--seed", str(options.seed)]
        return _step(options, [*overrides, *seed])
    from gradientspace.recluster import command

    command(options)


def _print_summary(path: Path) -> None:
    from gradientspace.tables import method_rows, render

    results = json.loads((path / "evaluation/results.json").read_text())
    print(render(*method_rows(results)))
    print("\n" + "\n".join(results["verdict"]))
    print(f'\n{path}/report.html shows it; next: gradientspace generate {path} "a prompt"')


def _data(options: argparse.Namespace, overrides: list[str]) -> None:
    from gradientspace.data import accounting_table, load, render_sample
    from gradientspace.models import load_tokenizer

    config = load_config(options.config, overrides).validate()
    tokenizer = load_tokenizer(config.model)
    data = load(config.data, tokenizer, config.seed)
    print(accounting_table(data.accounting))
    print("\nOne sample, supervised tokens marked:\n")
    print(render_sample(data.fit[0], tokenizer))


def _report(options: argparse.Namespace, overrides: list[str]) -> None:
    from gradientspace.report import write_comparison, write_report
    from gradientspace.run_folder import Run

    if options.compare:
        print(write_comparison([Run.open(path) for path in options.compare], options.output))
        return
    if options.run is None:
        raise ConfigError("no run given: gradientspace report RUN, or gradientspace report --compare RUN RUN")
    if Path(options.run).is_dir() and not overrides:
        print(write_report(Run.open(options.run)))
        return
    from gradientspace.pipeline import run

    _print_summary(run(load_config(options.run, overrides)).path)


def _diagnose(options: argparse.Namespace, overrides: list[str]) -> None:
    from gradientspace.diagnosis import diagnose
    from gradientspace.diagnosis.words import text

    print(text(*diagnose(load_config(options.config, overrides))))


def _inspect(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.inspection import Filter, export, render, samples_of, select
    from gradientspace.run_folder import Run

    wanted = Filter(options.cluster, options.boundary, options.source, options.text, options.sort)
    found = select(samples_of(Run.open(options.run)), wanted)
    if options.export:
        export(found, options.export)
        print(f"{len(found)} samples written to {options.export}")
    else:
        print(render(found, options.limit))


def _route(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.inference import decide
    from gradientspace.router import Router
    from gradientspace.run_folder import Run

    run = Run.open(options.run)
    router = Router.load(run.require("router", f"router {options.run}"))
    decision = decide(router.predict_proba([options.prompt])[0], router.threshold, router.fallback)
    if options.json:
        print(json.dumps(dataclasses.asdict(decision)))
        return
    runner_up = "" if decision.runner_up is None else f", runner-up expert {decision.runner_up}"
    chosen = f"fallback to {decision.name}" if decision.fallback else f"expert {decision.expert}"
    print(f"{chosen}, probability {decision.probability:.3f}{runner_up}")


def _generate(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.inference import RoutedModel

    model = RoutedModel.from_run(options.run)
    decision = model.route(options.prompt)
    expert = decision.answering()
    print(f"[{decision.name}, probability {decision.probability:.3f}]", file=sys.stderr)
    print(model.generate(options.prompt, expert=expert, max_new_tokens=options.max_new_tokens))


def _compare(options: argparse.Namespace, overrides: list[str]) -> None:
    from gradientspace.files import write_json
    from gradientspace.study import run_all, table
    from gradientspace.tables import render, study_rows

    entries = run_all(options.runs, seeds=options.seeds, split=options.split, overrides=overrides)
    found = table(entries, against=options.against)
    print(render(*study_rows(found)))
    if options.json:
        write_json(options.json, found)


def _export(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.export import export
    from gradientspace.run_folder import Run

    folder = export(Run.open(options.run), options.engine, options.output)
    print(f"{folder}\n" + "\n".join(f"  {p.relative_to(folder)}" for p in sorted(folder.rglob("*")) if p.is_file()))
    print(f"\nnext: read {folder}/README.md")


def _push(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.cards import push_to_hub
    from gradientspace.run_folder import Run

    print(push_to_hub(Run.open(options.run), options.repo_id, private=options.private))


def _demo(options: argparse.Namespace, _: list[str]) -> None:
    from gradientspace.demo.command import demo

    demo(options.control, Path(options.output_dir), seed=options.seed, fresh=options.fresh)


def _doctor(_options: argparse.Namespace, _: list[str]) -> int:
    from gradientspace.doctor import examine

    lines, missing = examine()
    print("\n".join(lines))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""`ray-diffsynth cache` (`python -m ray_diffsynth.cache`): look into a cache,
check it, repair it, see it, take it elsewhere.

Exit codes: 0 done and nothing wrong, 1 something is wrong with the cache, 2 a bad command line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ray_diffsynth.console import prepare_process
from ray_diffsynth.errors import UserError
from ray_diffsynth.program import command
from ray_diffsynth.system_errors import explain


def _inspect(options: argparse.Namespace) -> int:
    from ray_diffsynth.cache.inspection import facts_as_text, inspect_cache

    facts = inspect_cache(options.cache)
    print(json.dumps(facts, indent=2, ensure_ascii=False) if options.json else facts_as_text(facts))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ray_diffsynth import storage
    from ray_diffsynth.cache.errors import MissingFilesError, repair_advice
    from ray_diffsynth.cache.inspection import check_files
    from ray_diffsynth.cache.manifest import committed
    from ray_diffsynth.cache.verify import verify_cache

    try:  # said before all of it is read
        check_files(storage.absolute(options.cache), *committed(storage.absolute(options.cache)))
    except MissingFilesError as error:
        print(error, file=sys.stderr)
    files: list[str] = []
    found = verify_cache(options.cache, files.append)
    damage = [finding for finding in found if finding.kind == "damage"]
    unread = [finding for finding in found if finding.kind == "unreadable"]
    wrong = [*damage, *unread]
    for finding in found:
        print(f"{finding.kind}: {finding.path}: {finding.problem}", file=sys.stderr if finding in wrong else sys.stdout)
    not_read = f", {len(unread)} that cannot be read" if unread else ""
    spare = len(found) - len(wrong)
    print(f"{len(files)} files read: {len(damage)} damaged{not_read}, {spare} that nothing points to")
    if damage and not unread:
        print(repair_advice(options.cache), file=sys.stderr)
    return 1 if wrong else 0


def _repair(options: argparse.Namespace) -> int:
    from ray_diffsynth.cache.repair import repair_cache

    done = repair_cache(options.cache, prune=options.prune)
    for path in done.compacted:
        print(f"written anew without unused rows: {path}")
    for path, reason in done.removed:
        print(f"removed {path}: {reason}")
    print(
        "the cache is whole" if done.committed else f"run {command('preprocess')} again: it encodes only what is lost"
    )
    return 0


def _preview(options: argparse.Namespace) -> int:
    from ray_diffsynth.preview import write_preview

    shown = write_preview(options.cache, options.model, options.output, samples=options.samples, family=options.family)
    print(f"{len(shown)} samples in {options.output}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ray_diffsynth.cache.export import export_cache

    count = export_cache(options.cache, options.output, options.limit)
    print(f"{count} samples in {options.output}")
    return 0


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=command("cache"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "inspect": "what the cache holds",
        "verify": "read everything: checksums, orphans, finite numbers; exit code 1 for damage",
        "repair": f"remove what is damaged or unfinished; {command('preprocess')} then encodes what is lost",
        "preview": "a PNG of a few samples, decoded from their latents, beside their captions",
        "export": "one safetensors file a sample, and samples.jsonl",
    }
    subparsers = {name: commands.add_parser(name, help=text, description=text) for name, text in helps.items()}
    for subparser in subparsers.values():
        subparser.add_argument("cache", metavar="CACHE", help="folder or URL of the cache")
    subparsers["inspect"].add_argument("--json", action="store_true", help="print JSON")
    prune = "also drop files and rows that the manifest does not name, and what an interrupted run finished"
    subparsers["repair"].add_argument("--prune", action="store_true", help=prune)
    preview = subparsers["preview"]
    preview.add_argument("--model", required=True, help="model whose VAE decodes: a diffusers folder or hub id")
    preview.add_argument("--output", default="preview.png", metavar="PNG", help="the image to write")
    preview.add_argument("--samples", type=_count, default=8, metavar="N", help="how many samples, 8 if not given")
    preview.add_argument(
        "--family",
        help="your own module:Class, when it is not one of ray_diffsynth's; the cache's own word imports nothing",
    )
    export = subparsers["export"]
    export.add_argument("output", metavar="OUTPUT", help="folder or URL for the files")
    export.add_argument("--limit", type=_count, metavar="N", help="only the first N samples")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    if argv is None:
        prepare_process()
    options = make_parser().parse_args(argv)
    commands = {"inspect": _inspect, "verify": _verify, "repair": _repair, "preview": _preview, "export": _export}
    try:
        return commands[options.command](options)
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else explain(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())

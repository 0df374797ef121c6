#!/bin/bash
# jsonargparse 4.53.0: texts inside a dict[str, Any] are read as YAML once more, though the option was JSON.
#
# Guess: --settings '{"size": "010", "time": "1:30", "mode": "yes"}' gives these three texts, since JSON says so.
# What happens: a number, a number in base 60, and a truth value; parser_mode="json" still makes a number of the first.
# Seen: {'size': 10, 'time': 90, 'mode': True}; with parser_mode="json" {'size': 10, 'time': '1:30', 'mode': 'yes'}.
. "$(dirname "$0")/lib.sh"
install "jsonargparse==4.53.0" pyyaml==6.0.3
run <<'P'
from typing import Any

from jsonargparse import ArgumentParser

seen = []
for mode in ("yaml", "json"):
    parser = ArgumentParser(parser_mode=mode)
    parser.add_argument("--settings", type=dict[str, Any])
    seen.append(parser.parse_args(['--settings={"size": "010", "time": "1:30", "mode": "yes"}']).settings)
print(seen)
assert seen[0] == {"size": 10, "time": 90, "mode": True}
assert seen[1] == {"size": 10, "time": "1:30", "mode": "yes"}
P

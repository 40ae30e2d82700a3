#!/usr/bin/env bash
# visdom 0.3.0: `line` writes its own defaults into the caller's `opts`. A scatter plot that is given the same dictionary
# afterwards is drawn as a line. Expected: plots leave the caller's options alone. Copy the options for every call.
#
# Usage: PYTHON=python3.12 findings/visdom-opts-shared.sh      (Python 3.12 or newer; installs into a temporary folder)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check visdom==0.3.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import json
import pathlib

import numpy as np
import visdom


def mode_of_scatter(opts):
    """What visdom would send to its server: the mode of the points' trace."""
    log = pathlib.Path("posts.log")
    log.unlink(missing_ok=True)
    client = visdom.Visdom(offline=True, log_to_filename=str(log), use_incoming_socket=False, raise_exceptions=True)
    client.scatter(X=np.arange(10.0).reshape(5, 2), win="points", opts=opts)
    return json.loads(log.read_text().splitlines()[-1])[1]["data"][0]["mode"]


opts = {"title": "one dictionary"}
fresh = mode_of_scatter(dict(opts))
client = visdom.Visdom(offline=True, log_to_filename="line.log", use_incoming_socket=False, raise_exceptions=True)
client.line(X=np.arange(3.0), Y=np.arange(3.0), win="curve", opts=opts)
shared = mode_of_scatter(opts)
print(f"visdom {visdom.__version__}: opts after line: {opts}")
print(f"scatter with fresh opts: {fresh}; with the opts that line was given: {shared}")
assert (fresh, shared) == ("markers", "lines"), "the behaviour has changed"
END

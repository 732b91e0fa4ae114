#!/usr/bin/env bash
# setup.sh FOLDER [PYTHON]: creates a virtual environment in FOLDER with PYTHON, or with the first suitable Python. An
# unusable one from an earlier attempt is replaced.
set -euo pipefail
folder=$1
wanted=${2:-}

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; }
version() { "$1" -c 'import platform; print(platform.python_version())' 2> /dev/null || echo "not installed"; }
fail() { echo "error: $*" >&2; exit 1; }

if fits "$folder/bin/python" && "$folder/bin/python" -c 'import pip' 2> /dev/null; then
  exit
fi
python=
for candidate in ${wanted:-python3 python3.13 python3.12 python3.11 python3.14}; do
  if fits "$candidate"; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  fail "loraplex needs Python 3.11 or newer, but ${wanted:-python3} is $(version "${wanted:-python3}")." \
    "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.12)" \
    "or name one: make serve PYTHON=/path/to/python3.12"
fi
if ! "$python" -c 'import ensurepip, venv' 2> /dev/null; then
  fail "$python cannot create virtual environments." \
    "Debian, Ubuntu: apt install python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
fi
command -v g++ > /dev/null || command -v clang++ > /dev/null || echo \
  "warning: no g++, so the CPU kernels are not compiled and answers are slow. Debian, Ubuntu: apt install g++" >&2
rm -rf "$folder"
"$python" -m venv "$folder"

#!/bin/sh
# usage: install.sh PYTHON VENV [latest]    (from the repository root; `make install` calls it)
#
# Fills the virtual environment VENV, and makes it with PYTHON if need be. A Detectron2 that is importable, in VENV or
# in PYTHON, is left alone together with its torch, and only what is missing is added. Else the locked torch and
# Detectron2's re-upload are installed; with `latest`, the newest releases that base.in admits instead of
# the locked ones. May be interrupted and started again.
set -eu
PYTHON=$1
VENV=$2
RELEASES=${3:-locked}
HERE=$(dirname "$0")
PY=$VENV/bin/python

fail() {
    echo "install: $*" >&2
    exit 2
}

check_version() {
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        fail "'$1' does not run; name a Python from 3.10 to 3.14, e.g. make install PYTHON=python3.11"
    case $version in
    3.10 | 3.11 | 3.12 | 3.13 | 3.14) ;;
    *) fail "'$1' is Python $version, but one from 3.10 to 3.14 is needed: $2" ;;
    esac
}

# `detectron2` alone imports with anything; its layers need a torch and torchvision that fit
has_detectron2() {
    "$1" -c 'import detectron2.layers' >/dev/null 2>&1
}

if [ -x "$PY" ]; then
    check_version "$PY" "remove $VENV, or name another folder with VENV="
else
    check_version "$PYTHON" "name one with PYTHON=, e.g. make install PYTHON=python3.11"
fi
if ! "$PY" -m pip --version >/dev/null 2>&1; then
    echo "install: making $VENV with Python $version"
    "$PYTHON" -m venv "$VENV" || fail "'$PYTHON -m venv' failed (Debian and Ubuntu: apt install python$version-venv)"
fi

pip() {
    "$PY" -m pip --disable-pip-version-check "$@"
}
pip install --require-hashes -r "$HERE/build.txt"

SITE=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
LINK=$SITE/detectron2_elsewhere.pth

# Which Detectron2? Ours is the re-upload that no other has since replaced.
if [ -n "$(ls -d "$SITE"/sal_detectron2-*.dist-info 2>/dev/null)" ] &&
    [ -z "$(ls -d "$SITE"/detectron2-*.dist-info 2>/dev/null)" ]; then
    found=ours
elif has_detectron2 "$PY"; then
    found=theirs
elif has_detectron2 "$PYTHON"; then
    # A .pth and not --system-site-packages, which would pass over PYTHON's packages when PYTHON is a venv itself.
    # addsitedir also reads the .pth files there: an editable Detectron2 is found. VENV's own packages come first.
    "$PYTHON" - >"$LINK" <<'EOF'
import site
for folder in site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else []):
    print("import site; site.addsitedir(%r)" % folder)
EOF
    if has_detectron2 "$PY"; then
        found=theirs
    else # VENV is of another Python version
        echo "install: the Detectron2 of $PYTHON cannot be used from $VENV"
        rm -f "$LINK"
        found=none
    fi
else
    found=none
fi

# --no-build-isolation: what comes as source is built with the hash-checked setuptools from above
if [ $found = theirs ]; then
    echo "install: keeping $("$PY" -W ignore -c 'import detectron2, torch
print("Detectron2 %s (%s) and torch %s" % (detectron2.__version__, detectron2.__path__[0], torch.__version__))')"
    "$PY" "$HERE/missing.py" "$HERE/lock.txt" >"$VENV/missing.txt"
    pip install --no-deps --require-hashes --no-build-isolation -r "$VENV/missing.txt"
else
    echo "install: torch and the other locked packages (some 5 GB on Linux: torch brings its GPU libraries)"
    if [ "$RELEASES" = latest ]; then
        pip install --upgrade --no-build-isolation -r "$HERE/base.in"
    else
        pip install --require-hashes --no-build-isolation -r "$HERE/lock.txt"
    fi
    if [ $found = ours ]; then # of the version that is wanted now?
        have=$("$PY" -c 'from importlib.metadata import version; print(version("sal-detectron2"))')
        grep -q "^sal-detectron2==$have " "$HERE/detectron2.txt" || found=none
    fi
fi

# --no-deps: why is in the file
pip install --no-deps --require-hashes --no-build-isolation -r "$HERE/evaluators.txt"

if [ $found = none ]; then
    echo "install: no Detectron2 found, installing its re-upload (see $HERE/detectron2.txt)"
    STAGE=$SITE/.detectron2-new # the same disk, so that the moves below are renames
    rm -rf "$STAGE"
    # the wheel is named for 3.10; without its compiled part it runs on any
    pip install --no-deps --require-hashes --only-binary=:all: --python-version 3.10 --target "$STAGE" \
        -r "$HERE/detectron2.txt"
    rm -rf "$STAGE/tools" "$STAGE"/detectron2/_C.* # why: see detectron2.txt
    rm -rf "$SITE"/sal_detectron2-*.dist-info "$SITE/detectron2"
    mv "$STAGE/detectron2" "$SITE/"
    mv "$STAGE"/sal_detectron2-*.dist-info "$SITE/"
    rm -rf "$STAGE"
fi

# quiet about setuptools' general warning on editable installations
PYTHONWARNINGS=ignore pip install --quiet --no-deps --no-build-isolation -e .
"$PY" -W ignore -c 'import detectron2.layers, detectron2.model_zoo, hotcoco, pycocotools' ||
    fail "the environment $VENV is incomplete, see the error above"
echo "install: $VENV is ready"

# Sourced, not run: finds or makes a virtual environment with ds-optim in it, and activates it.
#
#     DS_OPTIM_EXTRAS=test source launcher/install.sh || exit 1
#
# An active virtual environment that already meets every requirement is used as it is (only ds-optim itself is linked
# into it). Otherwise .venv in the repository is made, filled under constraints.txt, and activated; a stamp in it makes
# later calls instant until setup.py, constraints.txt or the interpreter change, or extras that it does not name are
# asked for. PYTHON chooses the interpreter of .venv.
# Needs python3, pip and, later, g++ (for the kernels that ds-optim builds on first use).

_ds_optim_stamp() {  # what the environment was made from; $1 = python, $2 = extras
    { cat setup.py constraints.txt; printf '%s\n' "$PWD" "$2"; "$1" --version; } | "$1" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

_ds_optim_was_made() {  # $1 = python, $2 = extras; silent, true or false: with these extras, or with these and others
    local IFS=, stamp_file made extra  # the commas between extras
    [ -x "$1" ] || return 1
    for stamp_file in "$(dirname "$1")"/../ds-optim-*.stamp; do
        [ -s "$stamp_file" ] || continue
        made=${stamp_file##*/ds-optim-} made=${made%.stamp}
        for extra in $2; do
            [[ ,$made, == *,$extra,* ]] || continue 2
        done
        [ "$(cat "$stamp_file")" = "$(_ds_optim_stamp "$1" "${made/#base/}" 2>/dev/null)" ] && return 0
    done
    return 1
}

_ds_optim_meets_requirements() {  # $1 = python, $2 = extras; silent, true or false
    "$1" - "$2" <<'PYTHON' 2>/dev/null
import runpy, sys
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

setup = runpy.run_path("setup.py", run_name="requirements")
wanted = list(setup["REQUIREMENTS"])
for extra in filter(None, sys.argv[1].split(",")):
    wanted += setup["EXTRAS"][extra]
for requirement in map(Requirement, wanted):
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        sys.exit(1)
    if not requirement.specifier.contains(found, prereleases=True):
        sys.exit(1)
PYTHON
}

_ds_optim_install() {  # runs in the repository root; sets _ds_optim_venv
    local extras=${DS_OPTIM_EXTRAS:-} python=${PYTHON:-python3}
    if [ -n "${VIRTUAL_ENV:-}" ] && [ "$VIRTUAL_ENV" != "$PWD/.venv" ] \
        && _ds_optim_meets_requirements "$VIRTUAL_ENV/bin/python" "$extras"; then
        _ds_optim_venv=$VIRTUAL_ENV
    else
        _ds_optim_venv=$PWD/.venv
    fi
    local in_venv=$_ds_optim_venv/bin/python stamp_file=$_ds_optim_venv/ds-optim-${extras:-base}.stamp
    _ds_optim_was_made "$in_venv" "$extras" && return 0
    # DeepSpeed's own operators are built on first use or not at all; ours too.
    export DS_BUILD_OPS=0
    if [ "$_ds_optim_venv" != "$PWD/.venv" ]; then
        echo "ds-optim: linking this checkout into the active environment $_ds_optim_venv"
        "$in_venv" -m pip install --quiet --no-deps -e . || return 1
    else
        if ! "$in_venv" -c 'import pip' 2>/dev/null; then
            echo "ds-optim: making the virtual environment .venv"
            # Debian's python3 without python3-venv cannot give a new environment its pip; the outer pip can.
            "$python" -m venv .venv 2>/dev/null || {
                rm -rf .venv
                "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install --quiet pip
            } || { echo "ds-optim: $python can make no virtual environment (Debian: apt-get install python3-venv)" >&2; return 1; }
        fi
        echo "ds-optim: installing the requirements into .venv (once; a few minutes)"
        # DeepSpeed is a source distribution; old pips would run its setup.py inside .venv instead of building a wheel.
        "$in_venv" -m pip install --quiet --use-pep517 -c constraints.txt -e ".${extras:+[$extras]}" || return 1
    fi
    _ds_optim_stamp "$in_venv" "$extras" > "$stamp_file"
}

_ds_optim_here=$PWD
_ds_optim_status=0
{ cd "$(dirname "${BASH_SOURCE[0]}")/.." && _ds_optim_install; } || _ds_optim_status=$?
cd "$_ds_optim_here"
if [ $_ds_optim_status -eq 0 ]; then
    source "$_ds_optim_venv/bin/activate"
    # Operators that are built on first use: in a folder of this environment's own, unless TORCH_EXTENSIONS_DIR is set.
    TORCH_EXTENSIONS_DIR=$(python -m ds_optim.extension_builds) || _ds_optim_status=$?
    export TORCH_EXTENSIONS_DIR
fi
[ $_ds_optim_status -eq 0 ]

# Sourced by run, test and bench: makes the environment that they start in.
#
#   prepare FOLDER LEVEL [PYTHON VERSION]
#
# leaves in $root/FOLDER a virtual environment in which the project runs (LEVEL
# `run`) or is tested (LEVEL `test`), on the first Python that fits or on PYTHON.
#
# The environment bears a stamp: all that it was made from, as text. It is
# written last and taken away first, so an environment without a stamp, or with
# another than the checkout asks for, is unfinished or stale and is made anew.
# The usual start compares the stamp and does nothing else.
#
# Everything said here goes to standard error; standard output is the caller's.
# shellcheck shell=bash

root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null && pwd -P)

say() {
  printf '%s\n' "$*" >&2
}

fail() {
  say "$@"
  exit 1
}

# The executable and version behind a command, where it is a Python that serves.
# In a virtual environment that is its base: the environment may be the very one
# that is made anew.
probe() {
  "$1" -I -c '
import ensurepip, fcntl, sys, venv
if sys.version_info < (3, 11):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable), sys.version.split()[0], sep="|")
' </dev/null 2>/dev/null
}

# find_python VERSION...: sets `python` and `python_version` to the first that
# runs, of those on PATH before those of pyenv. An empty VERSION is any.
find_python() {
  local wanted candidate found
  for wanted in "$@"; do
    while IFS= read -r candidate; do
      [[ -x $candidate ]] || continue
      found=$(probe "$candidate") || continue
      [[ -z $wanted || ${found##*|} == "$wanted".* ]] || continue
      python=${found%|*} python_version=${found##*|}
      return 0
    done < <(
      type -aP "python${wanted:-3}" || true
      if [[ -n $wanted ]]; then
        printf '%s\n' "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$wanted".*/bin/python
      fi
    )
  done
  return 1
}

# Sets `project` to what pyproject.toml says of installing, without the tools.
read_project() {
  local line is_kept=yes
  project=
  while IFS= read -r line || [[ -n $line ]]; do
    case $line in
      '[tool.hatch'*) is_kept=yes ;;
      '[tool.'* | '[[tool.'*) is_kept=no ;;
      '['*) is_kept=yes ;;
    esac
    if [[ $is_kept == yes ]]; then
      project+=$line$'\n'
    fi
  done <"$root/pyproject.toml"
}

# Sets `stamp_run` and `stamp_test`, the stamps of an environment on VERSION.
# The checkout's path is in them: an environment does not survive being moved.
expect_stamps() {
  stamp_run=$root$'\n'$1$'\n'$project$(<"$root/scripts/pins.txt")
  stamp_test=$stamp_run$'\n'$(<"$root/scripts/pins-dev.txt")
}

# Tells whether the environment's stamp is LEVEL's; sets `stamp` to what it has.
is_ready() {
  local folder=$1 level=$2 version=$3
  stamp=
  [[ -f $folder/stamp && -x $folder/bin/python && -x $folder/bin/placement ]] || return 1
  if [[ -z $version ]]; then
    # Asked of the interpreter, not of pyvenv.cfg: that one cannot tell that the
    # Python beneath was removed or replaced.
    version=$("$folder/bin/python" -I -S -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || return 1
  fi
  expect_stamps "$version"
  stamp=$(<"$folder/stamp")
  [[ $stamp == "$stamp_test" || ($level == run && $stamp == "$stamp_run") ]]
}

write_stamp() {
  printf '%s\n' "$2" >"$1/stamp.part"
  mv -f -- "$1/stamp.part" "$1/stamp"
}

# Runs pip in the environment, deaf to the caller's PYTHON* variables.
# Without dependencies: what is not pinned must not slip in.
install() {
  local folder=$1
  shift
  "$folder/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-input --no-deps "$@" >&2
}

# Brings the environment to LEVEL; the caller holds its lock.
set_up() {
  local folder=$1 level=$2 report
  local broken="The set-up of ${folder##*/} did not finish, see above. The next start begins it anew."

  expect_stamps "$python_version"
  if [[ -n $stamp && $stamp == "$stamp_run" ]]; then
    say "Adding what the tests need to ${folder##*/} ..."
    rm -f -- "$folder/stamp"
  else
    say "Setting up ${folder##*/} with Python $python_version ($python) ..."
    rm -f -- "$folder/stamp"
    rm -rf -- "$folder"
    "$python" -I -m venv "$folder" >&2 || fail "$broken"
    install "$folder" -r "$root/scripts/pins.txt" || fail "$broken"
    install "$folder" --no-build-isolation -e "$root" || fail "$broken"
  fi
  if [[ $level == test ]]; then
    install "$folder" -r "$root/scripts/pins-dev.txt" || fail "$broken"
    stamp_run=$stamp_test
  fi
  # The pins must hold all that the packages ask for.
  report=$("$folder/bin/python" -I -m pip check --disable-pip-version-check) || fail "$report"$'\n'"$broken"
  write_stamp "$folder" "$stamp_run"
}

prepare() {
  local folder=$root/$1 level=$2 python=${3:-} python_version=${4:-}
  local project stamp stamp_run stamp_test

  read_project
  if is_ready "$folder" "$level" "$python_version"; then
    return 0
  fi

  if [[ -z $python ]] && ! find_python 3.11 3.12 3.13 ''; then
    say "actor-placement needs Python 3.11 or later, with venv; none was found on PATH or among pyenv's."
    say "Install one and start again, for example with one of"
    say "    pyenv install 3.11"
    say "    apt install python3.11 python3.11-venv"
    say "    brew install python@3.11"
    exit 1
  fi

  # The lock is on the open file: it ends with the last process that has it open,
  # however that one ends. Python takes it, because not every system has flock(1).
  exec 9>"$folder.lock"
  "$python" -I -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("Waiting for another start, which is setting up ...", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
'
  if ! is_ready "$folder" "$level" "${4:-}"; then
    set_up "$folder" "$level"
  fi
  exec 9>&-
}

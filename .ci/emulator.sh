# What the stages share that start a kernel in an emulator: sourced by .ci/kernel and .ci/log-writes,
# which have a folder $root.

cannot() {
  echo "$1"
  exit 77
}

# What is missing is installed, where that is possible.
needs() { # needs PACKAGE COMMAND...
  local package=$1 command missing=
  shift
  for command in "$@"; do
    if [[ $command == /* ]]; then
      [ -e "$command" ] || missing=$command
    else
      command -v "$command" >/dev/null || missing=$command
    fi
  done
  [ -z "$missing" ] && return
  { apt-get install -y --no-install-recommends "$package" ||
    { apt-get update && apt-get install -y --no-install-recommends "$package"; }; } \
    >"$root/apt.log" 2>&1 </dev/null
  for command in "$@"; do
    if [[ $command == /* ]]; then [ -e "$command" ]; else command -v "$command" >/dev/null; fi ||
      cannot "no $command: apt-get install $package"
  done
}

# Commands that use one processor each, or that mostly wait, beside each other. Sourced by scripts.

# Runs each line of its input as a command, as many at a time as there are processors. The output of
# a command is printed whole when it has ended. All of them run. False if one has failed, or if
# there is none.
side_by_side() {
  local folder commands number failed=0
  folder=$(mktemp -d) || return 1
  mapfile -t commands
  [ "${#commands[@]}" -gt 0 ] || {
    echo "nothing to run side by side"
    return 1
  }
  for number in "${!commands[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    {
      (eval "${commands[number]}") >"$folder/$number" 2>&1 </dev/null && : >"$folder/$number.passed"
      flock "$folder" cat "$folder/$number"
    } &
  done
  wait
  for number in "${!commands[@]}"; do
    [ -e "$folder/$number.passed" ] || {
      echo "failed: ${commands[number]}"
      failed=1
    }
  done
  rm -rf "$folder"
  return "$failed"
}

# A line for `side_by_side`.
later() { # later COMMAND ARGS...
  printf '%q ' "$@"
  echo
}

# Checks of documents against the code, for the stage lint. Sourced by .ci/run.

check_documents() {
  check_unfinished && check_history && check_switches && check_stages && check_links && .ci/words
}

check_unfinished() {
  local unfinished
  unfinished=$(git grep -nE '(TODO|XXX|todo!\(|unimplemented!\()' -- '*.rs' '*.toml' '*.md' || true)
  [ -z "$unfinished" ] || {
    printf 'unfinished work:\n%s\n' "$unfinished"
    return 1
  }
}

# Each test that docs/history.md names is there.
check_history() {
  local name missing=0
  for name in $(grep -oE '`[a-z0-9_]+`' docs/history.md | tr -d '`' | sort -u); do
    [ "$name" = set_tracking ] || git grep -qE "fn $name\\b" -- '*.rs' || {
      echo "docs/history.md names a test that does not exist: $name"
      missing=1
    }
  done
  return "$missing"
}

# The README and the documentation of the crate name every feature.
check_features() {
  local name missing=
  for name in $(features); do
    grep -q "^| \`$name\` |" README.md || missing="$missing README.md:$name"
    grep -q "^//! \* \`$name\` (off by default" src/lib.rs || missing="$missing src/lib.rs:$name"
  done
  [ -z "$missing" ] || {
    echo "features that are not listed:$missing"
    return 1
  }
}

# The table of CONTRIBUTING.md has exactly the switches that there are: the cfgs that Cargo.toml lets
# rustc accept, those of the tools that the code asks for, and the variables of programs and scripts.
check_switches() {
  local there listed
  there=$({
    grep -m1 '^unexpected_cfgs' Cargo.toml | grep -oE 'cfg\([a-z_]+\)' | sed -E 's/cfg\((.*)\)/\1/'
    git grep -ohE 'cfg(_attr|!)?\(.*\b(miri|doctest|docsrs)\b' -- '*.rs' | grep -oE 'miri|doctest|docsrs'
    git grep -ohE 'DIRTYMAP_[A-Z_]+' -- '*.rs' .ci ':!*.md'
    git grep -ohE 'env::var(_os)?\("[A-Z_]+"' -- '*.rs' | grep -oE '[A-Z_]{2,}'
    git grep -ohE '\$\{[A-Z_]+:-' -- .ci | grep -oE '[A-Z_]{2,}'
  } | sort -u)
  listed=$(sed -n '/^## Switches/,/^## /s/^| `\([A-Za-z_]*\)`.*/\1/p' CONTRIBUTING.md | sort -u)
  differ "the table of switches in CONTRIBUTING.md" "$there" "$listed"
}

# The table of stages has exactly those that .ci/run has.
check_stages() {
  local listed
  listed=$(sed -n '/^## Stages/,/^## /s/^| `\([a-z-]*\)`.*/\1/p' CONTRIBUTING.md | sort -u)
  differ "the table of stages in CONTRIBUTING.md" \
    "$(declare -F | sed -n 's/^declare -f stage_//p' | sort -u)" "$listed"
}

differ() { # differ WHERE THERE LISTED
  local differences
  differences=$(diff <(printf "%s\n" "$2") <(printf "%s\n" "$3") | sed -n 's/^</is missing:/p; s/^>/does not exist:/p')
  [ -z "$differences" ] || {
    printf '%s:\n%s\n' "$1" "$differences"
    return 1
  }
}

# A relative link of a document leads to something that is there.
check_links() {
  local file link broken=0
  while IFS=: read -r file link; do
    [ -e "$(dirname "$file")/$link" ] || {
      echo "$file links to what does not exist: $link"
      broken=1
    }
  done < <(links $(git ls-files '*.md'))
  return "$broken"
}

# The relative links of documents, as `file:link`: those in place, and those of references.
links() { # links FILE...
  grep -HoE '\]\([^)# ]+|^\[[^]]+\]: [^# ]+' -- "$@" |
    sed -E 's/\]\(//; s/:\[[^]]+\]: /:/' | grep -vE ':[a-z]+://|:mailto:'
}

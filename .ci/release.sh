# Stages about what is released, and to whom: packages, toolchains, targets, the public interface.
# Sourced by .ci/run.

# The crates that are published: all but those that say that they are not.
published() {
  local manifest
  for manifest in $(grep -L '^publish = false' $(git ls-files Cargo.toml '*/Cargo.toml')); do
    sed -n 's/^name = "\(.*\)"/\1/p;T;q' "$manifest"
  done
}

# The same, as arguments of cargo.
packages() {
  published | sed 's/^/-p /'
}

# Every crate that can be published, in order: packed, unpacked, and built from what was packed. The
# documents of a package link to nothing that it lacks.
stage_package() {
  local manifest
  for manifest in $(grep -L '^publish = false' $(git ls-files Cargo.toml '*/Cargo.toml')); do
    package_links "$manifest" || return 1
  done
  # Cargo keeps what it unpacks for this by the folder and the version, also of an older commit. So
  # each run has a folder of its own.
  local target code
  mkdir -p target && target=$(mktemp -d "$PWD/target/package.XXXXXX") || return 1
  cargo publish --workspace --dry-run --locked --allow-dirty --target-dir "$target"
  code=$?
  rm -rf "$target"
  return "$code"
}

package_links() { # package_links MANIFEST
  local root files file link broken=0
  root=$(dirname "$1")
  files=$(cargo package --list --locked --allow-dirty --manifest-path "$1" 2>/dev/null) || return 1
  while IFS=: read -r file link; do
    link=$(realpath -m --relative-to "$root" "$root/$(dirname "$file")/$link")
    grep -qE "^$link(/|$)" <<<"$files" || {
      echo "$file links to $link, which the package of $1 lacks"
      broken=1
    }
  done < <(cd "$root" && links $(grep '\.md$' <<<"$files"))
  return "$broken"
}

# The oldest Rust that Cargo.toml promises. Where it is missing, clippy's incompatible_msrv (stage
# lint) stands in: it knows since when a function of std exists, not what the compiler understands.
# The feature roaring of the formats says that it needs a newer one.
stage_msrv() {
  local oldest
  oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  if ! cargo "+$oldest" --version >/dev/null 2>&1; then
    skip msrv "no toolchain $oldest: rustup toolchain install $oldest"
    return
  fi
  CARGO_TARGET_DIR=target/msrv cargo "+$oldest" check --locked -p dirtymap --lib \
    --features "$(features | tr '\n' ' ')" &&
    CARGO_TARGET_DIR=target/msrv cargo "+$oldest" check --locked $(packages) --lib
}

# Other systems and processors: the library builds there with all features. One of 32 bits is refused
# with words.
stage_targets() {
  local targets="aarch64-unknown-linux-gnu x86_64-pc-windows-msvc aarch64-apple-darwin"
  local narrow=i686-unknown-linux-gnu target said missing=
  for target in $targets $narrow; do
    rustup target list --installed 2>/dev/null | grep -qx "$target" || missing="$missing $target"
  done
  if [ -n "$missing" ] && ! rustup target add $missing >target/rustup.out 2>&1; then
    skip targets "$(tail -n 1 target/rustup.out)"
    return
  fi
  # One at a time: together each would get the features that dependencies have on the others.
  for target in $targets; do
    cargo check --locked $(packages) --lib --all-features --target "$target" ||
      return 1
  done
  said=$(cargo check --locked -p dirtymap --lib --target "$narrow" 2>&1) && {
    echo "$narrow is not refused"
    return 1
  }
  grep -q 'dirtymap needs a target with 64-bit pointers' <<<"$said" || {
    printf '%s\n%s is refused, but not with words\n' "$said" "$narrow"
    return 1
  }
}

# The documentation as docs.rs makes it: with nightly, and the features that each item needs.
stage_docs-rs() {
  nightly docs-rs || return 0
  RUSTDOCFLAGS="--cfg docsrs -D warnings" CARGO_TARGET_DIR=target/docs-rs \
    cargo +nightly doc --locked --no-deps --all-features $(packages)
}

# Each dependency in the oldest version that the manifests allow: they promise no more than is used.
# In a copy of what is published, without the dependencies of tests, which have minimums of their own.
stage_minimal-versions() {
  nightly minimal-versions || return 0
  local copy=target/minimal manifest members= packages
  packages=$(packages)
  rm -rf "$copy" && mkdir -p "$copy" || return 1
  git ls-files -z | xargs -0 cp --parents -Pt "$copy" || return 1
  (
    cd "$copy" && rm Cargo.lock rust-toolchain.toml || exit 1
    for manifest in $(grep -L '^publish = false' */Cargo.toml adapters/*/Cargo.toml); do
      members="$members \"$(dirname "$manifest")\","
      without_dev_dependencies "$manifest" || exit 1
    done
    without_dev_dependencies Cargo.toml &&
      sed -i -E "/^members = \[/,/^\]/c members = [$members ]" Cargo.toml &&
      sed -i '/^default-members = /d' Cargo.toml &&
      cargo +nightly update -Z direct-minimal-versions &&
      CARGO_TARGET_DIR=../minimal-build cargo check --locked $packages --lib --all-features
  )
}

without_dev_dependencies() { # without_dev_dependencies MANIFEST
  awk '/^\[/ { dev = /dev-dependencies/ } !dev' "$1" >"$1.new" && mv "$1.new" "$1"
}

nightly() { # nightly STAGE: false, and a skip, without that toolchain
  cargo +nightly --version >/dev/null 2>&1 && return
  skip "$1" "no nightly toolchain: rustup toolchain install nightly"
  return 1
}

# Installs a tool from crates.io unless it is there: false, and a skip, if it cannot be had.
tool() { # tool STAGE NAME
  cargo "${2#cargo-}" --version >/dev/null 2>&1 && return
  cargo install --locked "$2" && return
  skip "$1" "$2 cannot be installed"
  return 1
}

# The public interface of each published crate, blanket and automatic impls left out, against the
# snapshot in .ci/public-api: a change of it is seen in review. With BLESS=1 the snapshot is written.
stage_public-api() {
  nightly public-api || return 0
  tool public-api cargo-public-api || return 0
  local crate got
  for crate in $(published); do
    got=$(cargo +nightly public-api -p "$crate" --all-features -sss 2>target/public-api.out) || {
      cat target/public-api.out
      return 1
    }
    if [ -n "${BLESS:-}" ]; then
      mkdir -p .ci/public-api && echo "$got" >".ci/public-api/$crate.txt"
    fi
    diff ".ci/public-api/$crate.txt" <(echo "$got") || {
      echo "the public interface of $crate has changed: BLESS=1 .ci/run public-api"
      return 1
    }
  done
  external_types
}

# Types of other crates in the public interface of a crate are those that .ci/external-types lists:
# a release of such a crate breaks ours.
external_types() {
  local there crate
  there=$(for crate in $(published); do
    grep -ohE '\b[a-z_]+(::[A-Za-z_]+)+' ".ci/public-api/$crate.txt" | sed 's/::.*//' | sort -u |
      grep -vxE "core|alloc|std|${crate//-/_}" | sed "s/^/$crate: /"
  done | sort -u)
  differ ".ci/external-types" "$there" "$(grep -v "^#" .ci/external-types | sort -u)"
}

# The interface against the newest tag `v*`: the version number must say what the change does.
stage_semver() {
  local release
  release=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || {
    echo "no release yet: nothing to compare with"
    return 0
  }
  tool semver cargo-semver-checks || return 0
  cargo semver-checks --baseline-rev "$release" $(packages)
}

# Licences, sources and advisories of dependencies, as deny.toml has them. Without the database of
# advisories, which comes from elsewhere than crates, all but those.
stage_deny() {
  tool deny cargo-deny || return 0
  if cargo deny --workspace --all-features fetch db >/dev/null 2>&1; then
    cargo deny --workspace --all-features check
    return
  fi
  cargo deny --workspace --all-features check bans licenses sources || return 1
  skip deny "the database of advisories cannot be fetched; licences and sources are in order"
}

# Builds that several stages share. Sourced by scripts.

# The packages with programs that stages start in the release profile. A build names all of them,
# because a build of one package alone has other features of the shared crates, and compiles these
# once more. `proptests` is not among them: it adds `__sabotage` to the library.
programs=(dirtymap-examples backup-example pagetable-sim adapter-examples dirtymap-kvm
  dirtymap-pagemap dirtymap-vfio dirtymap-vhost dirtymap-vm-memory dirtymap-benches)
programs=("${programs[@]/#/--package=}")

# Builds some of these programs.
release() { # release --examples | --bin NAME...
  # An example, because a build without one has other features again.
  cargo build --release --locked "${programs[@]}" --example rounds "$@"
}

# The programs with tests, from what `cargo test --no-run` printed.
tests_in() { # tests_in FILE
  sed -n 's/^ *Executable .*(\(.*\))$/\1/p' "$1"
}

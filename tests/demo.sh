#!/usr/bin/env bash
# `make demo`: an encrypted repository of a real directory, from nothing to a compared restore. Each command is shown.
set -euo pipefail

source_dir=${1:-/usr/include}
work=$(mktemp -d)
trap 'chmod -R u+rwX "$work" && rm -rf "$work"' EXIT
export COFFRET_PASSPHRASE="correct horse battery staple"
export XDG_CACHE_HOME="$work/cache" XDG_STATE_HOME="$work/state"
repository="$work/repository"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

echo "COFFRET_PASSPHRASE is set for this demonstration; on a terminal coffret asks for it."
run coffret version
run coffret at "$repository" create
run coffret at "$repository" backup "$source_dir"
run coffret at "$repository" backup "$source_dir"
run coffret at "$repository" ls
run coffret at "$repository" check
run coffret at "$repository" restore --to "$work/restored" latest
run coffret at "$repository" info
run diff --recursive --no-dereference "$source_dir" "$work/restored"
printf '\nThe restored directory is the same as %s: %s files, %s.\n' "$source_dir" \
    "$(find "$work/restored" -type f | wc -l)" "$(du -sh "$work/restored" | cut -f1)"

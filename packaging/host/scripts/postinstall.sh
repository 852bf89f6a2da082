#!/bin/sh
# After the files are there. dpkg says "configure", rpm how many versions there are now.
set -eu
lib=/usr/lib/modelfs

# Daemons import modules and read data when they first need them, so the files of their version must stay until
# they have ended, which is after a package manager has replaced them. Therefore nothing runs from $lib/dist, but
# from a copy, one for each installation. Copies are hard links and cost no space.
install_copy() {
  copy=$(mktemp -d "$lib/copy.XXXXXX")
  cp -al "$lib/dist/." "$copy"
  chmod 0755 "$copy"
  ln -sfn "$(basename "$copy")" "$lib/next"
  mv -T "$lib/next" "$lib/current"
}

hand_mounts_over() {
  findmnt --types fuse.modelfs --noheadings --raw --output TARGET | while read -r place; do
    place=$(printf '%b' "$place")
    modelfs upgrade "$place" || echo "modelfs: $place goes on with the version it was mounted with" >&2
  done
}

remove_old_copies() {
  for copy in "$lib"/copy.*; do
    [ "$copy" != "$(readlink -f "$lib/current")" ] || continue
    # Every daemon has compiled modules of its copy mapped.
    grep -qsF "$copy/" /proc/[0-9]*/maps || rm -rf "$copy"
  done
}

case "$1" in
configure | 1 | 2)
  systemd-sysusers modelfs.conf
  systemd-tmpfiles --create modelfs.conf || :  # without /proc it refuses; then it does so at the next boot
  install_copy
  [ ! -d /run/systemd/system ] || systemctl daemon-reload
  hand_mounts_over
  remove_old_copies
  ;;
esac

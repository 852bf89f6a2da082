#!/bin/sh
# Before the files go. dpkg says "remove" or "upgrade", rpm how many versions there will be.
set -eu

case "$1" in
remove | 0)
  if [ -d /run/systemd/system ]; then
    systemctl stop 'modelfs@*.service'
  fi
  findmnt --types fuse.modelfs --noheadings --raw --output TARGET | while read -r place; do
    modelfs umount --lazy "$(printf '%b' "$place")" || :
  done
  ;;
esac

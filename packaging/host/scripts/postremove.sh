#!/bin/sh
# After the files are gone. dpkg says "remove", and "purge" if nothing shall remain; rpm how many versions are left.
set -eu

case "$1" in
remove | 0)
  rm -rf /usr/lib/modelfs
  [ ! -d /run/systemd/system ] || systemctl daemon-reload
  ;;
purge)
  rm -f /etc/systemd/system/*.wants/modelfs@*.service
  rm -rf /etc/modelfs /var/cache/modelfs /var/log/modelfs /run/modelfs
  ! getent group modelfs >/dev/null || groupdel modelfs
  ;;
esac

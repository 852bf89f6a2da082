"""``mount.modelfs``: what mount(8) calls it with becomes a command line, or is refused as it expects."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modelfs.cli.fstab import words
from modelfs.errors import ConfigError

PROGRAM = [sys.executable, "-c", "from modelfs.cli.fstab import main; main()"]


@pytest.mark.parametrize(
    ("called", "command"),
    [
        ("/etc/models.yaml /models", "mount /models --config=/etc/models.yaml"),
        ("none /models -o rw", "mount /models"),
        ("hf://org/name /models", "mount /models --source=name=hf://org/name"),
        ("hf://org/name@v1/x /models", "mount /models --source=name=hf://org/name@v1/x"),
        ("s3://bucket /models -o name=bert", "mount /models --source=bert=s3://bucket"),
        ("s3://bucket/a/b/ /models", "mount /models --source=b=s3://bucket/a/b/"),
        ("none /models -o ro,allow_other,no_locked", "mount /models --allow-other --no-locked"),
        ("none /models -o cache_dir=/c -o cache-size=5G", "mount /models --cache-dir=/c --cache-size=5G"),
        ('none /models -o source="a=http://h/x,y",rw', "mount /models --source=a=http://h/x,y"),
        (
            "none /models -n -o noauto,nouser,_netdev,nofail,x-systemd.automount,noatime,defaults",
            "mount /models",
        ),
        ("none /models -sv -o what=ever,keep_going -t modelfs", "mount /models --keep-going"),
        ("none /models -f -o keep_going", ""),
    ],
)
def test_what_a_line_means(called: str, command: str) -> None:
    assert words(called.split(" ")) == command.split()


@pytest.mark.parametrize("option", ["remount", "allow_other=yes", "cache_dir", "cache_dir=", "secret=s3cr3t"])
def test_other_options_are_refused_without_their_values(option: str) -> None:
    with pytest.raises(
        ConfigError, match=f"mount option '{option.partition('=')[0]}' is not one of"
    ) as found:
        words(["none", "/models", "-o", option])
    assert "s3cr3t" not in str(found.value)


def test_a_url_without_a_name_needs_one() -> None:
    with pytest.raises(ConfigError, match=r"^s3://bucket: a model needs a name"):
        words(["s3://key:s3cr3t@bucket", "/models"])


@pytest.mark.parametrize(
    ("called", "code"),
    [
        ("none", 1),
        ("none /models -o remount", 1),
        ("none /models -N other", 1),
        ("none /models -f", 0),
        ("/does/not/exist.yaml /models", 32),
    ],
)
def test_exit_codes_are_those_of_mount(called: str, code: int) -> None:
    done = subprocess.run([*PROGRAM, *called.split()], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr

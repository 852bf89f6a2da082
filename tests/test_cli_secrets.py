"""What the command line refuses is refused without repeating the secret that is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelfs import cli

SECRET = "canary-7f3a"

SECRET_URLS = (
    f"https://me:{SECRET}@models.invalid:none/",
    f"https://me:{SECRET}@/",
    f"https://models.invalid/x/?token={SECRET}",
    f"s3://AKIA:{SECRET}@models/bert/",
    f"s3://models/../?X-Amz-Signature={SECRET}",
    f"hf://me:{SECRET}@huggingface.co/org/name",
    f"hf://org/name@main/../?token={SECRET}",
    f"file://me:{SECRET}@host/model",
    f"nope://me:{SECRET}@host/",
    f"me:{SECRET}@host/model",
)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command line that must be refused in one line; return what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    out, err = capsys.readouterr()
    assert ended.value.code not in (0, 1)
    assert err.startswith("modelfs: ")
    assert err.count("\n") == 1
    return out + err


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_malformed_url_is_refused_without_its_secret(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SECRET not in refused(capsys, "ls", url)
    assert SECRET not in refused(capsys, "mount", str(tmp_path), "--source", f"m={url}")


@pytest.mark.parametrize(
    "text",
    [
        "models: {m: {source: 'http://models.invalid/', options: {headers: 'X-Token: SECRET'}}}",
        "models: {m: {source: 'http://models.invalid/', options: 'X-Token: SECRET'}}",
        "models: {m: {source: 'http://models.invalid/', options: {headers: {X-Token: 'ä SECRET'}}}}",
        "models: {m: {source: 'http://models.invalid/', options: {headers: {'X-Token: SECRET': ''}}}}",
        "models: {m: {source: 'http://me:SECRET@models.invalid/x/?y'}}",
        "models: {m: {source: {'http://me:SECRET@models.invalid/': }}}",
        "models: {m: {'http://me:SECRET@models.invalid/': }}",
        "models: {'http://me:SECRET@models.invalid/'}",
        "models: {m: {source: 'http://h/', options: {headers: {X-Token: *SECRET}}}}",
        "models: {m: {source: 'http://h/', options: {headers: {X-Token: !SECRET}}}}",
        "models: {m: {source: 'http://h/', options: {headers: {X-Token: !SECRET x}}}}",
        "models: {m: {source: 'http://h/', options: {headers: {X-Token: %SECRET}}}}",
        "models: {m: {source: 'http://h/', options: {headers: {X-Token: @SECRET}}}}",
        "models: {m: {source: 's3://models/', options: {secret: SECRET}}}",
        "models: {m: {source: 's3://models/', options: {region: [SECRET]}}}",
        "models: {m: {source: 's3://models/', options: {addressing_style: SECRET}}}",
        "models: {m: {source: 's3://models/', options: {endpoint_url: 'http://me:SECRET@h/'}}}",
        "models: {m: {source: 'hf://org/name', options: {endpoint: 'http://me:SECRET@h/'}}}",
        "stores: {'https://models.invalid/': 'X-Token: SECRET'}",
        "stores: {'https://me:SECRET@models.invalid/': 1}",
        "stores: {'https://me:SECRET@models.invalid': {}, 'HTTPS://me:SECRET@models.invalid': {}}",
        "stores: {'https://me:SECRET@models.invalid': {}, 'https://me:SECRET@models.invalid': {}}",
        "stores: {'me:SECRET@models.invalid': {}}",
        "'https://me:SECRET@models.invalid/': 1",
        "X-Token SECRET",
    ],
)
def test_a_mistake_in_the_file_is_refused_without_its_secret(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "modelfs.yaml"
    file.write_text(text.replace("SECRET", SECRET))
    assert SECRET not in refused(capsys, "config", "check", str(file))


@pytest.mark.parametrize(
    "option", ["token={}", "headers={}", "headers={{X-Token: {}", "headers: {}", "h: {}="]
)
def test_a_mistake_in_an_option_is_refused_without_its_secret(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SECRET not in refused(capsys, "ls", "http://127.0.0.1:9/", "--option", option.format(SECRET))


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_checking_a_configuration_prints_no_secret(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "modelfs.yaml"
    file.write_text(
        f"""
stores:
  "https://me:{SECRET}@models.invalid/": {{headers: {{X-Token: {SECRET}}}}}
models:
  m: https://me:{SECRET}@models.invalid/m/
  q: https://models.invalid/model.bin?X-Amz-Signature={SECRET}
"""
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main(["config", "check", str(file), *words])
    out, err = capsys.readouterr()
    assert "https://models.invalid/model.bin" in out
    assert SECRET not in out + err

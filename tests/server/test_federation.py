"""`federation.yaml`: every mistake is one line that names it, and a good file says what it says."""

import re

import pytest
import yaml

from common.errors import ConfigError
from server.federation import read_federation

GOOD = {
    "name": "trial",
    "coordinator": {"hosts": ["coordinator.example.org", "192.0.2.7"]},
    "ledger": {"dataset": "notes", "cap": 8, "delta": 1e-5},
    "sites": ["ward-1", {"name": "ward-2", "cap": 4}],
}
MISTAKES = {
    "no mapping": ([1], "the file: must hold NAME: VALUE, one to a line"),
    "nothing": (None, "the file: must hold NAME: VALUE, one to a line"),
    "an unknown setting": ({"host": "x"}, "host: no such setting; there are name, coordinator, "),
    "no name": ({"name": ...}, "name: must be given"),
    "a name with blanks": ({"name": "my trial"}, "name=my trial: must be lower-case letters, "),
    "no sites": ({"sites": []}, "sites: must be a list of at least one site"),
    "a site that is named twice": (
        {"sites": ["a", "b", "a"]},
        "sites: a stands there twice; names must differ",
    ),
    "a site with a path for a name": (
        {"sites": ["../../etc"]},
        "sites[1].name=../../etc: must be lower-case letters, digits and hyphens, 32 at most, and "
        "not coordinator",
    ),
    "a site named coordinator": ({"sites": ["coordinator"]}, "sites[1].name=coordinator: must be "),
    "a site's unknown setting": (
        {"sites": [{"name": "a", "capp": 3}]},
        "sites[1].capp: no such setting; there are name, cap, dataset",
    ),
    "a site that is a number": ({"sites": [7]}, "sites[1]: must hold NAME: VALUE"),
    "a host with a port": (
        {"coordinator": {"hosts": ["example.org:8443"]}},
        "coordinator.hosts=['example.org:8443']: must be a list of DNS names or IP addresses, "
        "without ports",
    ),
    "hosts that are a text": ({"coordinator": {"hosts": "example.org"}}, "coordinator.hosts="),
    "an address that is none": ({"coordinator": {"hosts": ["300.1.2.3"]}}, "coordinator.hosts="),
    "no hosts": ({"coordinator": {"port": 1}}, "coordinator.hosts: must be given"),
    "a port that is none": (
        {"coordinator": {"hosts": ["a"], "port": 70000}},
        "coordinator.port=70000: must be a port, 1 to 65535",
    ),
    "one port for both": (
        {"coordinator": {"hosts": ["a"], "port": 8000}},
        "coordinator.control_port=8000: must not be the door's port, too",
    ),
    "a listening name": (
        {"coordinator": {"hosts": ["a"], "listen": "lo"}},
        "coordinator.listen=lo: must be an IP address",
    ),
    "a cap of nothing": (
        {"ledger": {"dataset": "notes", "cap": 0, "delta": 1e-5}},
        "ledger.cap=0: must be a number above 0",
    ),
    "a delta that is one": (
        {"ledger": {"dataset": "notes", "cap": 1, "delta": 1}},
        "ledger.delta=1: must be between 0 and 1",
    ),
    "an officer's key that is none": (
        {"ledger": {"dataset": "notes", "cap": 1, "delta": 1e-5, "officer_key": "me"}},
        "ledger.officer_key=me: must be 64 hex digits",
    ),
    "a data set of two lines": (
        {"ledger": {"dataset": "a\nb", "cap": 1, "delta": 1e-5}},
        "ledger.dataset=a b: must be a text in one line",
    ),
    "days that are no number": ({"days": "long"}, "days=long: must be a number of days"),
    "a switch that is a text": ({"stock_supernodes": "maybe"}, "must be true or false"),
    "bodies below Flower's parts": ({"door": {"max_body_mb": 1}}, "door.max_body_mb=1: must be "),
    "an image with a blank": ({"image": "a b; rm"}, "image=a b; rm: must be the name of an image"),
}


def described(folder, changes=None):
    content = changes if not isinstance(changes, dict) else {**GOOD, **changes}
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if value is not ...}
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(name, tmp_path):
    changes, said = MISTAKES[name]
    path = described(tmp_path, changes)
    with pytest.raises(ConfigError) as error:
        read_federation(path)
    text = str(error.value)
    assert said in text
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


def test_all_mistakes_are_said_at_once(tmp_path):
    path = described(tmp_path, {"days": -1, "name": "A B", "sites": [{"cap": 1}]})
    with pytest.raises(ConfigError, match=re.escape("days=-1")) as error:
        read_federation(path)
    for part in ("name=A B", "sites[1].name: must be given"):
        assert part in str(error.value)


def test_what_is_no_yaml_or_no_file_is_said(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: {")
    for path, said in (
        (broken, "is no YAML"),
        (tmp_path / "none", "no such file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_federation(path)


def test_a_good_file_says_what_it_says(tmp_path):
    path = described(tmp_path, {})
    # As people write it: YAML 1.1 takes this for a text.
    path.write_text(path.read_text().replace("1.0e-05", "1e-5"))
    federation = read_federation(path)
    assert federation.address == "coordinator.example.org:8443"
    assert federation.ledger.delta == 1e-5
    assert [(site.name, site.cap) for site in federation.sites] == [("ward-1", 0.0), ("ward-2", 4)]
    by_number = read_federation(described(tmp_path, {"coordinator": {"hosts": ["2001:db8::7"]}}))
    assert by_number.address == "[2001:db8::7]:8443"

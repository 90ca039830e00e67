"""A hostfile is read as mlx.launch reads it, and every mistake in it is told where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxmesh.cluster.hostfile import (
    BACKENDS,
    CONTROL_PORT,
    ENVS,
    FAST_SYNCH,
    Endpoint,
    Host,
    Hostfile,
    HostfileError,
    load,
    may_be_set,
    parse,
)
from fluxmesh.errors import UsageError

EXAMPLES = sorted((Path(__file__).parents[2] / "hostfiles").glob("*.json"))


def mistakes(data: Any) -> tuple[str, ...]:
    """What is told about a file that holds `data`."""
    with pytest.raises(HostfileError) as caught:
        parse(json.dumps(data))
    assert "\n" not in str(caught.value)
    assert all(mistake in str(caught.value) for mistake in caught.value.mistakes)
    return caught.value.mistakes


def host(**keys: Any) -> dict[str, Any]:
    return {"ssh": "mac1", **keys}


def test_a_list_of_hosts_is_a_ring_in_the_order_of_the_list() -> None:
    hostfile = parse('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "me@b", "ips": ["10.0.0.2"]}]')
    assert hostfile == Hostfile(
        (Host(0, "a", ("10.0.0.1",)), Host(1, "me@b", ("10.0.0.2",))), "ring"
    )


def test_the_keys_that_the_page_lists_are_those_that_are_taken_over() -> None:
    page = (EXAMPLES[0].parent / "README.md").read_text()
    listed = page.partition("with a warning:\n")[2].partition(". ")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == ENVS


def test_the_object_that_distributed_config_writes_for_a_jaccl_mesh() -> None:
    data = {
        "backend": "jaccl",
        "envs": [
            *("MLX_METAL_FAST_SYNCH=1", "NCCL_DEBUG=INFO", "HF_TOKEN=hf_x"),
            "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1",
        ],
        "hosts": [
            {"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, ["rdma_en2", "rdma_en3"]]},
            {"ssh": "b", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None]},
        ],
    }
    hostfile = parse(json.dumps(data))
    assert hostfile.backend == "jaccl"
    assert hostfile.hosts[0].rdma == (None, ("rdma_en2", "rdma_en3"))
    assert hostfile.hosts[1].rdma == (("rdma_en2",), None)
    assert hostfile.envs == (("NCCL_DEBUG", "INFO"), ("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1"))
    fast, token = hostfile.warnings
    assert "MLX_METAL_FAST_SYNCH" in fast and "hang the GPU" in fast
    assert "HF_TOKEN" in token and "hf_x" not in token


def test_the_ethernet_file_of_distributed_config_names_no_backend() -> None:
    assert parse(json.dumps({"backend": "", "envs": [], "hosts": [host()]})).backend == "ring"


def test_fluxmeshs_own_keys() -> None:
    hostfile = parse(
        json.dumps(
            [
                host(
                    control="10.0.0.1:7000",
                    python="/opt/venv/bin/python",
                    models="~/models",
                    memory="1.5GiB",
                )
            ]
        )
    ).hosts[0]
    assert hostfile.control == Endpoint("10.0.0.1", 7000)
    assert (hostfile.python, hostfile.models) == ("/opt/venv/bin/python", "~/models")
    assert hostfile.memory == 3 << 29
    assert parse(json.dumps([host(control="[fe80::1]:7000")])).hosts[0].control == Endpoint(
        "fe80::1", 7000
    )


@pytest.mark.parametrize(
    ("value", "size"),
    [(10**6, 10**6), ("2 MB", 2_000_000), ("48GB", 48 * 10**9), ("1.5MiB", 3 << 19)],
)
def test_memory_is_bytes_or_a_size_with_a_unit(value: Any, size: int) -> None:
    assert parse(json.dumps([host(memory=value)])).hosts[0].memory == size


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_hostfiles(path: Path) -> None:
    hostfile = load(path)
    name, size = path.stem.split("-")
    assert len(hostfile.hosts) == int(size)
    assert hostfile.backend == ("jaccl" if name == "jaccl" else "ring")
    assert hostfile.warnings == ()


def test_every_example_is_there() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == {"local-1", "local-2", "local-4", "thunderbolt-2", "thunderbolt-4", "jaccl-4"}


def test_several_agents_on_one_machine_have_ports_of_their_own() -> None:
    hostfile = load(next(path for path in EXAMPLES if path.stem == "local-4"))
    assert [hostfile.local_index(rank) for rank in range(4)] == [0, 1, 2, 3]
    assert len({hostfile.control(rank) for rank in range(4)}) == 4
    assert {hostfile.control(rank).address for rank in range(4)} == {"127.0.0.1"}


def test_an_agent_listens_where_ssh_leads_not_on_the_ring() -> None:
    hostfile = parse('[{"ssh": "me@mac1.local", "ips": ["192.168.0.1"]}]')
    assert hostfile.control(0).address == "mac1.local"
    assert not hostfile.hosts[0].is_local


def test_a_port_of_ssh_may_stand_behind_the_name() -> None:
    """OpenSSH takes `me@mac1:2222` for a name; a URI it reads."""
    given = {
        "mac1:2222": "ssh://mac1:2222",
        "me@mac1.local:22": "ssh://me@mac1.local:22",
        "me@10.0.0.7:2222": "ssh://me@10.0.0.7:2222",
        "me@[fe80::1]:2222": "ssh://me@[fe80::1]:2222",
        "[fe80::1%en0]:22": "ssh://[fe80::1%en0]:22",
        "ssh://me@mac1:2222": "ssh://me@mac1:2222",
        "ssh://[fe80::1]:22": "ssh://[fe80::1]:22",
        "me@[fe80::1]": "me@fe80::1",
        "me@fe80::1": "me@fe80::1",
        "fe80::1": "fe80::1",
        "[::1]": "[::1]",
        "me@mac1": "me@mac1",
        "mac1": "mac1",
    }
    for text, ssh in given.items():
        (read,) = parse(json.dumps([{"ssh": text}])).hosts
        assert read.ssh == ssh, text
    names = [parse(json.dumps([{"ssh": text}])).hosts[0].name for text in given]
    assert names[:5] == ["mac1", "mac1.local", "10.0.0.7", "fe80::1", "fe80::1%en0"]
    assert not parse('[{"ssh": "localhost:2222"}]').hosts[0].is_local, "another sshd than ours"


@pytest.mark.parametrize("ssh", ["mac1:0", "mac1:65536", "mac1:", "mac1:x", "me@[fe80::1", "[a]b"])
def test_what_ssh_could_not_read_is_a_mistake(ssh: str) -> None:
    (mistake,) = mistakes([{"ssh": ssh}])
    assert "ssh: expected" in mistake


def test_a_mark_of_byte_order_is_no_mistake(tmp_path: Path) -> None:
    text = '[{"ssh": "127.0.0.1"}]'
    path = tmp_path / "mesh.json"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(path) == parse(text) == parse("\ufeff" + text)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(HostfileError, match="UTF-16; save it as UTF-8"):
        load(path)


def test_agents_of_one_machine_have_lists_of_ports_with_none_in_common() -> None:
    local = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    named = {**local, "control": f"127.0.0.1:{CONTROL_PORT + 1}"}
    hostfile = parse(json.dumps([local, named, local, {"ssh": "mac1", "ips": ["10.0.0.1"]}]))
    lists = [hostfile.control_ports(rank) for rank in range(4)]
    assert lists[1] == (CONTROL_PORT + 1,)
    assert not set(lists[0]) & set(lists[2])
    assert CONTROL_PORT + 1 not in lists[0] + lists[2], "that one is named"
    assert [len(ports) > 50 for ports in lists] == [True, False, True, True]
    assert [ports[0] for ports in lists] == [hostfile.control(rank).port for rank in range(4)]
    assert lists[3][0] == CONTROL_PORT
    settled = hostfile.at_ports({0: 5, 1: 6, 3: 7})
    assert [settled.control(rank).port for rank in (0, 1, 3)] == [5, CONTROL_PORT + 1, 7]
    assert settled.control(3).address == "mac1"


@pytest.mark.parametrize(
    ("ssh", "name"),
    [
        ("mac1", "mac1"),
        ("me@mac1.local", "mac1.local"),
        ("ssh://me@mac1:2222", "mac1"),
        ("fe80::1", "fe80::1"),
        ("ssh://[fe80::1]:22", "fe80::1"),
    ],
)
def test_the_name_of_a_machine_is_without_user_and_port(ssh: str, name: str) -> None:
    assert Host(0, ssh).name == name


def test_another_user_of_this_machine_is_reached_by_ssh_and_shares_its_ports() -> None:
    hosts = [{"ssh": name, "ips": ["127.0.0.1"]} for name in ("localhost", "me@localhost")]
    hostfile = parse(json.dumps(hosts))
    assert [host.is_local for host in hostfile.hosts] == [True, False]
    assert [host.machine for host in hostfile.hosts] == ["localhost", "localhost"]
    assert hostfile.control(0).port + 1 == hostfile.control(1).port


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("ssh", "-oProxyCommand=date", 'a name, an address or "user@name"'),
        ("ssh", "a b", "a name"),
        ("ssh", 7, "a name"),
        ("ssh", "me@-oProxyCommand=x", "a name"),
        ("ips", "10.0.0.1", "a list of IP addresses"),
        ("ips", ["mac1"], "a list of IP addresses"),
        ("ips", ["0.0.0.0"], "a list of IP addresses"),
        ("ips", ["fe80::1%a b"], "a list of IP addresses"),
        ("rdma", "rdma_en2", 'a list of "device", ["device", ...] or null'),
        ("rdma", [[]], "a list of"),
        ("rdma", ["a/../b"], "a list of"),
        ("control", "10.0.0.1", '"ADDRESS:PORT"'),
        ("control", "0.0.0.0:7000", '"ADDRESS:PORT"'),
        ("control", "fe80::1:7000", '"ADDRESS:PORT"'),
        ("control", "10.0.0.1:65536", '"ADDRESS:PORT"'),
        ("control", "10.0.0.1:0", '"ADDRESS:PORT"'),
        ("python", "python3", "the absolute path of a Python"),
        ("python", "/bin/sh\n-c", "the absolute path of a Python"),
        ("models", "models", "an absolute path"),
        ("memory", 0, "bytes, or a size"),
        ("memory", 32, "bytes, or a size"),
        ("memory", True, "bytes, or a size"),
        ("memory", "48", "bytes, or a size"),
        ("memory", 1.5, "bytes, or a size"),
    ],
)
def test_a_wrong_value_is_told_with_host_key_and_what_was_expected(
    key: str, value: Any, expected: str
) -> None:
    data = [host(ips=["10.0.0.9"]), {**host(ssh="mac2", ips=["10.0.0.8"]), key: value}]
    (mistake,) = mistakes(data)
    assert mistake.startswith(f"host 1, {key}: expected {expected}")
    assert "found" in mistake


def test_every_mistake_is_told_at_once() -> None:
    data = {"backend": "mlx", "host": [], "hosts": [{"ips": 3}, "mac2", host(memroy=1)]}
    sentences = mistakes(data)
    assert len(sentences) == 6
    assert any("backend: expected one of ring, jaccl" in mistake for mistake in sentences)
    assert any("'host' is no key" in mistake for mistake in sentences)
    assert any("host 0, ssh: expected" in mistake for mistake in sentences)
    assert any("host 0, ips: expected" in mistake for mistake in sentences)
    assert any("host 1, the entry: expected" in mistake for mistake in sentences)
    assert any("host 2, 'memroy' is no key; expected ssh, ips" in mistake for mistake in sentences)


@pytest.mark.parametrize(
    ("backend", "hosts", "mistake"),
    [
        ("ring", [host(), host(ssh="b")], "host 0, ips: expected the IPv4 addresses"),
        ("ring", [host(ips=["::1"]), host(ssh="b", ips=["::1"])], "host 0, ips: expected the IPv4"),
        (
            "ring",
            [host(ips=["10.0.0.1", "10.0.0.2"]), host(ssh="b", ips=["10.0.0.3"])],
            "host 1, ips: expected 2 as on host 0",
        ),
        ("nccl", [host(), host(ssh="b")], "host 0, ips: expected an address for nccl"),
        (
            "jaccl",
            [host(ips=["10.0.0.1"], rdma=[None, "a"]), host(ssh="b", rdma=["a"])],
            "host 1, rdma: expected 2 entries, one a host",
        ),
        (
            "jaccl",
            [host(ips=["10.0.0.1"], rdma=["a", "a"]), host(ssh="b", rdma=["a", None])],
            "host 0, rdma[0]: expected null for the host itself",
        ),
        (
            "jaccl",
            [host(ips=["10.0.0.1"], rdma=[None, None]), host(ssh="b", rdma=["a", None])],
            "host 0, rdma[1]: expected the device towards host 1, found nothing",
        ),
    ],
)
def test_what_a_backend_lacks_is_told(backend: str, hosts: list[Any], mistake: str) -> None:
    assert mistakes({"backend": backend, "hosts": hosts})[0].startswith(mistake)


def test_a_jaccl_ring_needs_devices_to_its_neighbours_alone() -> None:
    hosts = [
        host(ssh=f"mac{i}", ips=["10.0.0.1"], rdma=[None if (i - j) % 2 == 0 else "d" for j in r])
        for r in [range(4)]
        for i in r
    ]
    assert parse(json.dumps({"backend": "jaccl-ring", "hosts": hosts})).backend == "jaccl-ring"
    assert len(mistakes({"backend": "jaccl", "hosts": hosts})) == 4


def test_a_jaccl_mesh_has_at_most_eight_hosts() -> None:
    hosts = [
        host(ssh=f"mac{i}", ips=["10.0.0.1"], rdma=[None if i == j else "d" for j in range(9)])
        for i in range(9)
    ]
    assert mistakes({"backend": "jaccl", "hosts": hosts}) == (
        "hosts: expected at most 8 in a jaccl mesh, found 9.",
    )


def test_mpi_and_a_single_host_need_no_addresses() -> None:
    assert len(parse(json.dumps({"backend": "mpi", "hosts": [host(), host()]})).hosts) == 2
    for backend in BACKENDS:
        assert parse(json.dumps({"backend": backend, "hosts": [host()]})).backend == backend


def test_two_agents_cannot_share_a_port() -> None:
    hosts = [host(ips=["10.0.0.1"], control="10.0.0.1:7000")] * 2
    assert mistakes(hosts) == (
        'host 1, control: expected another port than host 0\'s, found "10.0.0.1:7000".',
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "3", "null", "[]", "{}", '{"hosts": {}}', "9" * 5000]
)
def test_what_is_no_hostfile_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="mine.json: "):
        parse(text, "mine.json")


def test_a_missing_or_endless_file_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match=r"mesh\.json: It can't be read \(No such file"):
        load(tmp_path / "mesh.json")
    (tmp_path / "big.json").write_bytes(b" " * (1 << 21))
    with pytest.raises(HostfileError, match=r"big\.json: It is larger than"):
        load(tmp_path / "big.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["hosts", "backend", "envs", "ssh", "ips", "rdma", "control", "memory", "x"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(VALUES)
def test_any_json_is_a_hostfile_or_one_sentence(data: Any) -> None:
    try:
        hostfile = parse(json.dumps(data))
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert [entry.rank for entry in hostfile.hosts] == list(range(len(hostfile.hosts)))


def test_what_can_hang_a_gpu_is_set_by_hand_alone() -> None:
    assert may_be_set(FAST_SYNCH) and FAST_SYNCH not in ENVS
    assert all(may_be_set(key) for key in ENVS)
    assert not may_be_set("LD_PRELOAD") and not may_be_set("MLX_RANK")

"""Hosts are joined where JAX's own detection finds several, and only there."""

import socket
import sys
import time
import types

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, k8s_cluster

from train.hosts import cluster, joining

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-04]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_5 = {name: value for name, value in OPEN_MPI.items() if "orte" not in name}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
TWO_SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
OTHERS = (
    "JOB_COMPLETION_INDEX",
    "KUBERNETES_SERVICE_HOST",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "TPU_SKIP_MDS_QUERY",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    joining.METHOD,
    joining.SECONDS,
)


@pytest.fixture
def joined(monkeypatch):
    """With what hosts were joined, a call each; times out that are JAX's own are left out."""
    calls = []

    def initialize(initialization_timeout, **given):
        calls.append(given)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    watch = types.SimpleNamespace(join=lambda number, count: None, begin=lambda: None)
    monkeypatch.setattr(joining, "WATCH", watch)
    monkeypatch.setattr(joining.EXCHANGE, "begin", lambda *given: None)
    for name in (*OTHERS, *SLURM, *OPEN_MPI, *BY_HAND, *TWO_SLICES):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def tpu_vm(monkeypatch):
    """This machine as a Cloud TPU VM: what its metadata server says, by key."""
    answers: dict[str, str] = {"tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(
        cloud_tpu_cluster,
        "get_metadata",
        lambda key: (answers.get(key, ""), 200 if key in answers else 404),
    )
    return answers


def setenv(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def found(hosts):
    return None if hosts is None else (hosts.number, hosts.count, hosts.found)


def test_a_laptop_asks_nobody(joined, monkeypatch):
    def refuse(key):
        raise AssertionError("no look-up of metadata on a machine without TPUs")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", refuse)
    cluster.start()
    assert joined == []


@pytest.mark.parametrize(
    ("workers", "environment", "expected"),
    [
        ("a,b,c,d", "", (2, 4)),
        ("w:0:10.0.0.1,w:1:10.0.0.2,w:2:10.0.0.3", "", (2, 3)),
        ("a,b,c,d", "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'", (6, 8)),
        ("a", "", None),
    ],
    ids=["slice", "old names", "two slices", "one host"],
)
def test_cloud_tpu_vms_are_found_by_the_metadata_server(
    workers, environment, expected, joined, tpu_vm
):
    """Nothing in the environment names the other hosts of a slice."""
    tpu_vm |= {
        "agent-worker-number": "2",
        "worker-network-endpoints": workers,
        "tpu-env": environment,
    }
    cluster.start()
    assert found(joining.find_hosts()) == (expected and (*expected, "GceTpuCluster"))
    assert joined == [{"cluster_detection_method": "gcetpu"}] * bool(expected)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, (1, 2)),
        ({"TPU_PROCESS_ADDRESSES": "a,b,c", "TPU_WORKER_ID": "2"}, (2, 3)),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"} | TWO_SLICES, (3, 4)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
    ids=["slice", "addresses", "two slices", "one host"],
)
def test_gke(variables, expected, joined, tpu_vm, monkeypatch):
    setenv(monkeypatch, variables)
    cluster.start()
    assert found(joining.find_hosts()) == (expected and (*expected, "GkeTpuCluster"))
    assert joined == [{"cluster_detection_method": "gketpu"}] * bool(expected)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        # An interactive shell in a job of four tasks, and what Cloud TPU VMs say in it.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        # A batch script that calls python without srun, and a shell of salloc.
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),
        (OPEN_MPI, "ompi"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (SLURM | OPEN_MPI, "ompi"),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | OPEN_MPI | {"PARAVT_CLUSTER": "slurm"}, "slurm"),
        # Anything in Kubernetes that is no pod of an indexed job.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_schedulers(variables, name, joined, monkeypatch):
    setenv(monkeypatch, variables)
    cluster.start()
    assert joined == ([{"cluster_detection_method": name}] if name else [])


def test_an_address_by_hand_leaves_the_rest_to_the_cluster(joined, monkeypatch):
    """JAX reads the address itself."""
    setenv(monkeypatch, SLURM | {"JAX_COORDINATOR_ADDRESS": "node02:7"})
    cluster.start()
    assert joined == [{"cluster_detection_method": "slurm"}]


@pytest.mark.parametrize(("pods", "expected"), [(3, (1, 3)), (1, None)])
def test_kubernetes_jobs(pods, expected, joined, monkeypatch):
    setenv(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    fake = types.SimpleNamespace(
        config=types.SimpleNamespace(load_incluster_config=lambda: None),
        client=types.SimpleNamespace(
            CoreV1Api=object,
            BatchV1Api=object,
            exceptions=types.SimpleNamespace(ApiException=OSError),
        ),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", fake)
    job = types.SimpleNamespace(spec=types.SimpleNamespace(parallelism=pods))
    monkeypatch.setattr(k8s_cluster.K8sCluster, "_job", lambda: job)
    cluster.start()
    assert found(joining.find_hosts()) == (expected and (*expected, "K8sCluster"))
    assert joined == [{}] * bool(expected)


def test_mpi4py_where_it_is_asked_for(joined, monkeypatch):
    """Of Open MPI 5 and MPICH JAX reads no variables."""
    world = types.SimpleNamespace(Get_size=lambda: 4, Get_rank=lambda: 3)
    mpi = types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world), __spec__=True)
    monkeypatch.setitem(sys.modules, "mpi4py", mpi)
    cluster.start()
    assert joined == []
    setenv(monkeypatch, OPEN_MPI_5 | {"PARAVT_CLUSTER": "mpi4py"})
    cluster.start()
    assert joined == [{"cluster_detection_method": "mpi4py"}]


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (OPEN_MPI_5, "OMPI_COMM_WORLD_SIZE=2.*mpi4py.*PARAVT_CLUSTER=mpi4py"),
        ({"PMI_SIZE": "8"}, "PMI_SIZE=8.*PARAVT_CLUSTER=mpi4py"),
        ({"JOB_COMPLETION_INDEX": "1"}, r"JOB_COMPLETION_INDEX=1.*jax\[k8s\]"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2.*set JAX_COORDINATOR_ADDRESS"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: JAX_NUM_PROCESSES=2.*0 to 1"),
        (BY_HAND | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': set it to a number"),
        (BY_HAND | {"JAX_COORDINATOR_ADDRESS": "h"}, "JAX_COORDINATOR_ADDRESS='h'.*HOST:PORT"),
        ({"PARAVT_CLUSTER": "k8"}, "PARAVT_CLUSTER=k8: choose one of gcetpu, gketpu, mpi4py"),
        ({"PARAVT_CLUSTER": "ompi"}, "PARAVT_CLUSTER=ompi: JAX finds no such cluster"),
        ({"PARAVT_JOIN_SECONDS": "soon"}, "PARAVT_JOIN_SECONDS='soon': set it to whole seconds"),
        (SLURM | {"SLURM_NTASKS": "four"}, r"SlurmCluster.*'four'.*set JAX_NUM_PROCESSES=1"),
    ],
)
def test_what_is_refused(variables, told, joined, monkeypatch):
    setenv(monkeypatch, variables)
    with pytest.raises(ValueError, match=told):
        cluster.start()
    assert joined == []


def test_hosts_named_by_hand_come_first(joined, monkeypatch):
    setenv(monkeypatch, SLURM | BY_HAND)
    cluster.start()
    assert joined == [{"coordinator_address": "h:1", "num_processes": 2, "process_id": 1}]


class Silent(ClusterEnv):
    @classmethod
    def is_env_present(cls):
        return True

    @classmethod
    def get_process_count(cls):
        raise RuntimeError("403 Forbidden")


class Slow(Silent):
    @classmethod
    def get_process_count(cls):
        time.sleep(5)


class Asked(Silent):
    opt_in_only_method = True


for kind in (Silent, Slow, Asked):
    ClusterEnv._cluster_types.remove(kind)


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Silent, r"Silent.*403 Forbidden.*JAX_NUM_PROCESSES=1"), (Slow, "Slow.*longer than 0.1 sec")],
)
def test_a_cluster_that_does_not_answer_is_named(kind, told, joined, monkeypatch):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [kind])
    monkeypatch.setattr(joining, "DEFAULT_SECONDS", 0.1)
    with pytest.raises(ValueError, match=told):
        cluster.start()


def test_methods_that_must_be_asked_for_are_not_tried(joined, monkeypatch):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Asked])
    cluster.start()
    assert joined == []


@pytest.mark.parametrize("listens", [True, False])
def test_hosts_that_do_not_come_are_waited_for_so_long(listens, joined, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if listens:
            server.listen()
        setenv(monkeypatch, BY_HAND | {"JAX_COORDINATOR_ADDRESS": address})
        monkeypatch.setattr(joining, "DEFAULT_SECONDS", 0.3)
        monkeypatch.setattr(jax.distributed, "initialize", lambda **given: time.sleep(60))
        began = time.monotonic()
        with pytest.raises(ValueError, match="host 1 of 2: the others did not join") as told:
            cluster.start()
    assert time.monotonic() - began < 30
    assert (f"nothing listens at {address}" in str(told.value)) != listens


def test_a_port_in_use(joined, monkeypatch):
    def in_use(**given):
        raise RuntimeError("UNKNOWN: Failed to start RPC server")

    setenv(monkeypatch, BY_HAND | {"JAX_PROCESS_ID": "0"})
    monkeypatch.setattr(jax.distributed, "initialize", in_use)
    with pytest.raises(ValueError, match=r"host 0 of 2: port 1 of this host is in use.*another"):
        cluster.start()


def test_a_jax_that_keeps_its_detectors_elsewhere_starts_and_says_so(joined, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)
    assert joining.find_hosts() is None
    assert "does not tell how it finds hosts; set JAX_NUM_PROCESSES=1" in capsys.readouterr().out

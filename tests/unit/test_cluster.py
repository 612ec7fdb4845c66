"""Hosts are joined where JAX's own detection finds several, and only there."""

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster

from train.hosts import cluster

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
OTHERS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "KUBERNETES_SERVICE_HOST",
    "SLURM_STEP_NUM_TASKS",
    "TPU_SKIP_MDS_QUERY",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
)


@pytest.fixture
def joined(monkeypatch):
    """How often hosts were joined, and with what."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    for name in (*OTHERS, *SLURM, *OPEN_MPI):
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


def test_a_laptop_asks_nobody(joined, monkeypatch):
    def refuse(key):
        raise AssertionError("no look-up of metadata on a machine without TPUs")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", refuse)
    cluster.start()
    assert joined == []


@pytest.mark.parametrize(
    ("hosts", "times"), [("a,b,c,d", 1), ("w:0:10.0.0.1,w:1:10.0.0.2", 1), ("a", 0)]
)
def test_cloud_tpu_pods_are_found_by_the_metadata_server(hosts, times, joined, tpu_vm):
    """Nothing in the environment names the other hosts of a pod."""
    tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": hosts}
    cluster.start()
    assert len(joined) == times


@pytest.mark.parametrize(("hosts", "times"), [("a,b", 1), ("a", 0)])
def test_gke(hosts, times, joined, tpu_vm, monkeypatch):
    setenv(monkeypatch, {"TPU_WORKER_HOSTNAMES": hosts, "TPU_WORKER_ID": "0"})
    cluster.start()
    assert len(joined) == times


@pytest.mark.parametrize(
    ("variables", "times"),
    [
        (SLURM, 1),
        (SLURM | {"SLURM_NTASKS": "1"}, 0),
        # An interactive shell in a job of four tasks.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 0),
        # A batch script that calls python without srun.
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, 0),
        (OPEN_MPI, 1),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, 0),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, 0),
    ],
)
def test_schedulers(variables, times, joined, monkeypatch):
    setenv(monkeypatch, variables)
    cluster.start()
    assert len(joined) == times


def test_hosts_named_by_hand_come_first(joined, monkeypatch):
    by_hand = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    setenv(monkeypatch, SLURM | by_hand)
    cluster.start()
    assert joined == [("h:1", 2, 1)]


def test_a_cluster_that_does_not_answer_is_named(joined, monkeypatch):
    class Silent(ClusterEnv):
        is_env_present = classmethod(lambda kind: True)

        @classmethod
        def get_process_count(cls):
            raise RuntimeError("403 Forbidden")

    ClusterEnv._cluster_types.remove(Silent)
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Silent])
    with pytest.raises(ValueError, match=r"Silent.*403 Forbidden.*JAX_NUM_PROCESSES=1"):
        cluster.start()


def test_methods_that_must_be_asked_for_are_not_tried(joined, monkeypatch):
    class Asked(ClusterEnv):
        opt_in_only_method = True
        is_env_present = classmethod(lambda kind: True)
        get_process_count = classmethod(lambda kind: 2)

    ClusterEnv._cluster_types.remove(Asked)
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [Asked])
    cluster.start()
    assert joined == []

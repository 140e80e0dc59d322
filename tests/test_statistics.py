"""Point estimates against rliable's, intervals against plain NumPy with the same resamples."""

import numpy as np
import pytest

from mam import statistics as st

RNG = np.random.default_rng(3)
MATRICES = [RNG.random((5, 3)), RNG.random((5, 3)) + 0.2]  # seeds × tasks, as rliable has them
A, B = ([*matrix.T] for matrix in MATRICES)

# rliable 1.2.0: metrics.aggregate_* and metrics.probability_of_improvement of the same matrices.
RLIABLE = {
    "IQM": (0.4240316289604664, 0.731842876465651),
    "median": (0.33823250833688145, 0.6284596106920906),
    "mean": (0.4255615929238264, 0.7282707828772418),
    "optimality gap": (0.5744384070761736, 0.29982512379260284),
}
RLIABLE_IQM_INTERVAL = (
    0.29816129655826695,
    0.5396495641917856,
)  # of A, 20,000 resamples of its own


@pytest.mark.parametrize("name", RLIABLE)
def test_estimates_are_those_of_rliable(name):
    found = [st.AGGREGATES[name](*tasks) for tasks in (A, B)]
    np.testing.assert_allclose(found, RLIABLE[name], rtol=1e-14)


def test_probability_of_improvement_is_that_of_rliable_and_counts_ties_half():
    np.testing.assert_allclose(st.improvement(*A, *B), 0.24, rtol=1e-14)
    assert st.improvement(np.ones(3), np.ones(4)) == 0.5
    np.testing.assert_allclose(st.improvement(*A, *B) + st.improvement(*B, *A), 1.0)


class Recorder(np.random.Generator):
    """Remembers the indices it gives."""

    def __init__(self):
        super().__init__(np.random.PCG64(7))
        self.drawn = []

    def integers(self, *args, **kwargs):
        self.drawn.append(super().integers(*args, **kwargs))
        return self.drawn[-1]


def numpy_iqm(scores):
    """The mean without the lowest and the highest quarter, rounded down, written out."""
    scores = np.sort(np.ravel(scores))
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].sum() / (len(scores) - 2 * cut)


def test_interval_of_the_iqm_equals_plain_numpy_with_the_same_indices():
    tasks = [*A, B[0][:4]]  # not as many seeds everywhere
    rng = Recorder()
    found = st.estimate(st.iqm, tasks, rng=rng)
    assert [draws.shape for draws in rng.drawn] == [(st.NUM_RESAMPLES, len(task)) for task in tasks]
    resampled = [
        numpy_iqm(
            np.concatenate([task[draws[i]] for task, draws in zip(tasks, rng.drawn, strict=True)])
        )
        for i in range(st.NUM_RESAMPLES)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    np.testing.assert_allclose(
        (found.value, found.low, found.high), (numpy_iqm(np.concatenate(tasks)), low, high)
    )


def test_interval_is_near_rliables_own():
    found = st.estimate(st.iqm, A)
    np.testing.assert_allclose((found.low, found.high), RLIABLE_IQM_INTERVAL, atol=0.01)


def test_rows_share_their_resamples():
    curve = st.estimate(st.mean, [np.stack([A[0], A[0] + 1])])
    np.testing.assert_allclose(curve.low[1], curve.low[0] + 1)
    again = st.estimate(st.mean, [A[0]])
    np.testing.assert_allclose((again.low, again.high), (curve.low[0], curve.high[0]))


def test_too_few_seeds_have_no_interval_and_beat_nothing():
    few, many = st.estimate(st.mean, [np.array([2.0, 3.0])]), st.estimate(st.mean, [A[0]])
    assert few.value == 2.5
    assert np.isnan([few.low, few.high]).all()
    assert not few.above(many)
    assert st.estimate(st.mean, [A[0] + 1]).above(many)
    assert not st.estimate(st.mean, [A[0][:4] + 1]).above(many)


def test_memory_of_a_bootstrap_is_bounded(monkeypatch):
    whole = st.estimate(st.mean, [A[0]])
    monkeypatch.setattr(st, "_BATCH", 50)
    parts = st.estimate(st.mean, [A[0]])
    np.testing.assert_allclose((parts.low, parts.high), (whole.low, whole.high), atol=1e-12)

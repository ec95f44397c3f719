"""Every solver of the package passes the tests that extensions have to pass."""

from lightning_nettrim import ADMM, Cardinality, Magnitude, SparseGPT, Wanda
from lightning_nettrim.testing import SolverContract


class TestADMM(SolverContract):
    solver = ADMM(max_steps=2000)
    rtol = 1e-3


class TestCardinality(SolverContract):
    solver = Cardinality()


class TestMagnitude(SolverContract):
    solver = Magnitude()


class TestWanda(SolverContract):
    solver = Wanda()


class TestSparseGPT(SolverContract):
    solver = SparseGPT()

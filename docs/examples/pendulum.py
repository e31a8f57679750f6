"""Fits a damped pendulum to noisy measurements by Newton's method. The Hessian of the fit is never formed: conjugate
gradients ask for its products with vectors, which are derivatives of the gradient along them (jvp of grad).

    python docs/examples/pendulum.py --noise 0.02
"""
from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from lazulite.engine import array as mx

STEP, STEPS = 0.2, 30                                     # seconds, and how many
TRUTH = np.array([4.0, 0.3, 1.2, -0.5])                    # stiffness 1/s², damping 1/s, angle, speed 1/s at the start
Vector = mx.array


def motion(p: Vector) -> Vector:
    """The angle after each step of Runge and Kutta's fourth order: angle'' = -stiffness sin(angle) - damping angle'."""
    def slope(state: Vector) -> Vector:
        return mx.stack([state[1], -p[0] * mx.sin(state[0]) - p[1] * state[1]])

    state, angles = p[2:], []
    for _ in range(STEPS):
        a = slope(state)
        b = slope(state + STEP / 2 * a)
        c = slope(state + STEP / 2 * b)
        d = slope(state + STEP * c)
        state = state + STEP / 6 * (a + 2 * b + 2 * c + d)
        angles.append(state[0])
    return mx.stack(angles)


def conjugate_gradients(product: Callable[[np.ndarray], np.ndarray], b: np.ndarray) -> np.ndarray:
    """Solves A x = b for as long as A is positive along the search (Steihaug 1983)."""
    x, r = np.zeros_like(b), b.copy()
    direction = r.copy()
    for _ in range(2 * len(b)):
        image = product(direction)
        curvature = direction @ image
        if curvature <= 1e-12 * (direction @ direction):
            return x if x.any() else b
        step = r @ r / curvature
        x, new = x + step * direction, r - step * image
        if np.linalg.norm(new) < 1e-10 * np.linalg.norm(b):
            break
        direction, r = new + new @ new / (r @ r) * direction, new
    return x


def fit(measured: np.ndarray, guess: np.ndarray, iterations: int) -> np.ndarray:
    data = mx.array(measured, mx.float64)

    def error(p: Vector) -> Vector:
        return 0.5 * mx.sum(mx.square(motion(p) - data))

    value_of, value_and_grad = mx.compile(error), mx.compile(mx.value_and_grad(error))
    hessian_product = mx.compile(lambda p, v: mx.jvp(mx.grad(error), [p], [v])[1][0])
    array = lambda x: mx.array(x, mx.float64)  # noqa: E731
    p = guess
    for i in range(iterations):
        value, gradient = (np.array(a) for a in value_and_grad(array(p)))
        print(f"{i:3d}  error {float(value):.6f}  gradient {np.linalg.norm(gradient):.1e}")
        if np.linalg.norm(gradient) < 1e-8:
            break
        move = conjugate_gradients(lambda v, p=p: np.array(hessian_product(array(p), array(v))), -gradient)
        length = 1.0
        while length > 1e-6 and float(value_of(array(p + length * move))) > value + 1e-4 * length * (gradient @ move):
            length /= 2
        p = p + length * move
    return p


def main(argv: list[str] | None = None) -> np.ndarray:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise", type=float, default=0.02, help="of each measured angle")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    truth = np.array(motion(mx.array(TRUTH, mx.float64)))
    found = fit(truth + args.noise * rng.normal(size=STEPS), np.array([3.0, 0.0, 1.0, 0.0]), args.iterations)
    for name, true, fitted in zip(("stiffness", "damping", "angle", "speed"), TRUTH, found, strict=True):
        print(f"{name:9s}  true {true:6.3f}  fitted {fitted:6.3f}")
    return found


if __name__ == "__main__":
    main()

"""The algorithm by itself, with models whose right answers are known on paper."""

import numpy as np

from mindiffedit import diffedit

SHAPE = (1, 2, 2, 3)


def latents_of(value):
    return np.full(SHAPE, value, np.float32)


def test_the_way_back_leads_home():
    """A model that predicts the same noise everywhere: DDIM's steps are then exact in both directions."""
    alphas = [0.9, 0.6, 0.3]  # of three noise levels, cleanest first; the steps are 0.9 -> 0.6 -> 0.3 and back
    noise = np.random.default_rng(0).standard_normal(SHAPE)

    def predict(latents, timestep):
        return noise

    def steps_between(levels):
        def update(index, latents, noise_prediction, pred_x0, background):
            here, there = levels[index], levels[index + 1]
            clean = (latents - (1 - here) ** 0.5 * noise_prediction) / here**0.5
            return there**0.5 * clean + (1 - there) ** 0.5 * noise_prediction, clean

        return update

    start = 0.9**0.5 * latents_of(2.0) + 0.1**0.5 * noise
    there = list(diffedit.invert(predict, steps_between(alphas), start, [1, 2]))
    assert [(step.index, step.timestep) for step in there] == [(0, 1), (1, 2)]
    # On paper: sqrt(alpha) x0 + sqrt(1 - alpha) noise, at every level, with the same x0.
    for step, alpha in zip(there, alphas[1:]):
        assert np.allclose(step.latents, alpha**0.5 * 2 + (1 - alpha) ** 0.5 * noise)
        assert np.allclose(step.pred_x0, 2.0) and step.noise_prediction is noise
    back = list(diffedit.denoise(predict, steps_between(alphas[::-1]), there[-1].latents, [2, 1], [None, None]))
    assert np.allclose(back[-1].latents, start)


def test_an_inversion_by_points_comes_nearer_to_what_leads_back():
    """A model whose noise depends on the latents: as many evaluations, a third of the plain error."""
    alphas = np.linspace(0.98, 0.2, 9)  # of the levels, cleanest first; -1 is the clean level
    levels = [*alphas, 1.0]
    start = np.random.default_rng(0).standard_normal(SHAPE)

    def predict(latents, timestep):
        return 0.5 * latents + 0.3 * np.sin(3 * latents)

    def ddim(latents, noise, here, there):
        clean = (latents - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * noise, clean

    def move(latents, here, there, noise, later, share):
        return ddim(latents, noise + share * (later - noise), levels[here], levels[there])

    def back(latents):
        for index in range(len(alphas) - 1, -1, -1):
            latents, _ = ddim(latents, predict(latents, index), levels[index], levels[index - 1])
        return latents

    def update(index, latents, noise_prediction, pred_x0, background):
        return ddim(latents, noise_prediction, levels[index - 1], levels[index])

    def error(steps):
        *_, last = steps
        return np.abs(back(last.latents) - start).mean()

    def by_points(count):
        points = diffedit.points_of(len(alphas), count)
        return error(diffedit.invert_by_points(predict, move, start, range(len(alphas)), points, np.zeros(SHAPE)))

    plain = error(diffedit.invert(predict, update, start, range(len(alphas))))
    assert by_points(9) < plain / 3 and by_points(9) < by_points(3) < by_points(1)


def test_a_step_gets_the_one_before_and_its_background():
    seen = []

    def update(index, latents, noise_prediction, pred_x0, background):
        seen.append((index, float(latents.mean()), noise_prediction, pred_x0, background))
        return latents + 1, index * 10

    steps = diffedit.denoise(lambda latents, t: -t, update, latents_of(0), [7, 5, 3], "abc")
    assert [step.pred_x0 for step in steps] == [0, 10, 20]
    assert seen == [(0, 0, -7, None, "a"), (1, 1, -5, 0, "b"), (2, 2, -3, 10, "c")]


def test_a_loop_goes_on_from_what_its_caller_puts_in_place():
    def update(index, latents, noise_prediction, pred_x0, background):
        return latents + 1, pred_x0

    latents = []
    for step in diffedit.invert(lambda latents, t: None, update, latents_of(0), range(3)):
        latents.append(float(step.latents.mean()))
        step.pred_x0 = step.index
        if step.index == 1:
            step.latents = latents_of(10)
    assert latents == [1, 2, 11] and step.pred_x0 == 2


def test_guidance_and_blend():
    assert (diffedit.guided(latents_of(1), latents_of(3), 2.5) == 1 + 2.5 * 2).all()
    mask = np.array([[[[1, 0, 0.5], [0, 0, 0]]]], np.float32)
    assert diffedit.blended(latents_of(8), mask, latents_of(4))[0, 1].tolist() == [[8, 4, 6], [4, 4, 4]]


def test_differences_with_and_without_guidance():
    source, target, negatives = latents_of(1), latents_of(4), (latents_of(0), latents_of(2))

    def value(scale, corrected, negatives):
        difference = diffedit.difference(source, target, scale, corrected, negatives)
        assert difference.dtype == np.float32 and np.ptp(difference) == 0
        return float(difference.mean())

    assert value(1.0, True, None) == value(0.0, False, None) == 3  # no guidance
    # n + s (p - n) of the target less that of the source: 2 + 3 * 2 - (0 + 3 * 1); turned round: 4 + 3 * (2 - 4) - ...
    assert value(3.0, True, negatives) == 5 and value(3.0, False, negatives) == (4 - 6) - (1 - 3)
    # Equal negatives cancel, whatever they are.
    same = (latents_of(7), latents_of(7))
    for corrected in (True, False):
        assert value(3.0, corrected, None) == value(3.0, corrected, same)


def test_the_map_is_the_mean_magnitude():
    # Two pictures of two maps each, one channel, one row of two latents.
    differences = np.array([[1, -3], [3, 1], [0, -8], [0, 0]], np.float32).reshape(4, 1, 1, 2)
    assert diffedit.difference_map(differences, 2).tolist() == [[[2, 2]], [[0, 4]]]
    # The median of each map, 2, 2, 4 and 0, caps what is above it.
    assert diffedit.difference_map(differences, 2, 0.5).tolist() == [[[1.5, 1.5]], [[0, 2]]]

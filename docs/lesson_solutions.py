"""Solutions of the exercises in lesson.ipynb; there, `%run docs/lesson_solutions.py` sets them."""

from epo import beta, entropy_loss

# 1. Episode 0 has (1.0 + 0.0) / 2 = 0.5. The turns of episode 1 have 0.2 and 0.9 / 3 = 0.3, so the
# episode has 0.25, and L_H is (0.5 + 0.25) / 2. The flat mean is 2.1 / 6. The token with 0.9 is one
# of 3 tokens, in one of 2 turns, in one of 2 episodes.
answer_1 = (0.375, 0.35, 1 / 12)

# 2. The indicator has no gradient, so the weights of both runs are equal in every step, and with
# them all that the policy does. Only the loss that is printed and its term differ.
answer_2 = {"loss", "smoothing_loss"}

# 3. Above the cap the gradient is -(1 - α·β_k). It is positive in every step if it is in the last
# one, k = 39, where β_k is smallest. The paper's α of 0.05 is far from it.
answer_3 = 1 / beta(39, 40, gamma=3.0)


def answer_4(batch):
    """About two thirds: all the words that follow from a decision, and the end of every turn.

    They are nearly certain because they should be. Below the floor the gradient is -(1 + α·β_k), so
    a floor is a second bonus for the tokens that need none.
    """
    floor = 0.5 * entropy_loss(batch.entropy, batch.weights)
    return batch.weights[batch.entropy < floor].sum().item()


# 5. Here groups differ, and the policy term has a gradient, in which the published λ is lost. One
# that is 100 times as large costs success, and a strong cap gives back a part of that.
answer_5 = {"good, λ 0.1, α 0.05", "good, λ 0.1, α 3"}

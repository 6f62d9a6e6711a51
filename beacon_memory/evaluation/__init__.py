"""Evaluation: how well questions are answered from compressed memory, compared with other ways to answer them."""

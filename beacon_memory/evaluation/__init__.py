"""Evaluation: how well questions are answered from compressed memory, beside other ways to answer them."""

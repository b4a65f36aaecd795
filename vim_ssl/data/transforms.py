"""Transforms, made from what an encoder says it expects."""


def create_transform(encoder, is_training: bool = False):
    raise NotImplementedError

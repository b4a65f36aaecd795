"""Loading and saving encoders."""


def load_encoder(source, **kwargs):
    raise NotImplementedError


def save_encoder(encoder, path):
    raise NotImplementedError

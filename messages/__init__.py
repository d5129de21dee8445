"""The messages between nodes: typed, versioned, one codec."""

from messages.codec import BadFrame, Codec
from messages.frames import Envelope, Frame

__all__ = ["BadFrame", "Codec", "Envelope", "Frame"]

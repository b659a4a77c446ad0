"""Exercise of chapter 1: the ids and the mask of a conversation."""


def build(pieces, role):
    """The ids of a conversation and their mask.

    pieces: a list of (author, ids) in the order of the conversation. The author is "program",
    "ToolMaker", "AutoAgent" or "ToolActor"; ids is a list of integers, which may be empty.
    role: the role that generates in this conversation.
    Returns two lists of the same length: the ids of all pieces, and the mask. The mask is 1 on
    what the role wrote, and 0 on everything else. The pieces stay as they are.
    """
    raise NotImplementedError


def mark(ids, header, end):
    """The mask of a conversation of which only the ids are known.

    ids: a list of integers.
    header: the ids of "<|im_start|>assistant\\n". A turn of the role begins right after them.
    end: the id of <|im_end|>. It ends the turn, and the role has generated it too. A turn that was
    cut off lacks it and reaches to the last id. A sampler can generate any id, so the ids of a
    header can stand inside a turn; they begin no other turn there.
    Returns a list of the length of ids: 1 inside the role's turns, 0 elsewhere.
    """
    raise NotImplementedError

"""Solution: the ids and the mask of a conversation."""


def build(pieces, role):
    ids = []
    mask = []
    for author, part in pieces:
        ids += part
        mask += [int(author == role)] * len(part)
    return ids, mask


def mark(ids, header, end):
    mask = []
    own = False
    for i, token in enumerate(ids):
        own = own or ids[max(0, i - len(header)):i] == header
        mask.append(int(own))
        own = own and token != end
    return mask

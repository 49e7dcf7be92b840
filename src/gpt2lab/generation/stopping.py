class GrowingText:
    def __init__(self, tokenizer, stop=()):
        self.tokenizer, self.ids, self.text, self.stopped = tokenizer, [], "", False

    def add(self, token_id):
        self.ids.append(token_id)
        whole = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        new = whole[len(self.text) :]
        self.text += new
        return new

    def finish(self):
        whole = self.tokenizer.decode(self.ids)
        new = whole[len(self.text) :]
        self.text += new
        return new

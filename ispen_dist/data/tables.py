class Sentence: pass
class MultiLabelTable: pass

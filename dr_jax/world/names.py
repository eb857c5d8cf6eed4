"""The pools that every name and literal of the world is made of: few words, used often, so a small BPE has them.

All of it is invented, or plain English put together in a way that names nothing known. The pools are disjoint.
"""

from __future__ import annotations


def words(text: str) -> tuple[str, ...]:
    """The words of a text, as a pool."""
    return tuple(text.split())


FIRST_NAMES = words("""
    Abrel Adelva Arneko Belisk Borvan Brisha Calvik Cordane Dalmira Davrin Delphar Dorvel Ebrin Elvara Emrik Estova
    Fabrel Falinda Ferrok Galvena Garvel Helvin Hestra Ilvara Imrek Ismeth Jarvena Jelko Jorrel Kasteri Kelvra Korvina
    Lavena Leskin Lorvel Malvek Marveth Nadrel Nelvar Olvira Orsken Pavrel Pelisha Quenda Quillan Ravika Relvin Rosheva
    Sabrik Selvara Tamrel Tavika Ulvena Umbrel Vaskin Velira Wendrik Wilvara Yelvan Zandrel
    """)
SURNAMES = words("""
    Abernok Aldane Arvess Balcor Barrisk Belgrane Benzar Blathe Borrune Brannok Calvess Carroth Chevane Corrish Crandle
    Dalloway Danvek Darrune Delsing Dravik Dunmere Eldrake Embrose Erskane Falgrim Farrost Fenwold Ferrune Galloth
    Garrune Geldane Grathe Grindal Hallorn Harrowe Helsin Hollisk Hurvane Ingrath Ironell Jarvell Jessek Kallorn Keldane
    Kestrane Korvald Lantry Larrisk Lindrake Lorrane Maddrok Malloth Marrune Mellick Morvane Narrock Nessing Norvald
    Oakrane Oddlan Orrish Pallock Parrune Pendrick Pralle Quarrel Questin Rallison Rendrake Rothane Rudvik Sallow
    Scarrow Selgrim Sorvane Stannok Tallorn Tarrisk Thessing Torvald Ullock Umbrane Vandrel Varrune Velgrim Voss
    Wallorn Wendrake Yarrick Zellane
    """)

ADJECTIVES = words("""
    Silent Hollow Brittle Patient Distant Borrowed Crooked Quiet Restless Gentle Frozen Hidden Wandering Painted
    Sleeping Narrow Faded Stubborn Careful Tangled Velvet Paper Copper Northern Salted Drifting Humble Idle Jagged
    Mellow Nimble Polite Rusted Scattered Tidal Unmarked Vacant Weathered Woven Hurried Tender Folded
    Muddy Whistling Seventh
    """)
NOUNS = words("""
    Harbor Lantern Orchard Ferry Compass Violin Staircase Meadow Parcel Kettle Ladder Umbrella Causeway Almanac Windmill
    Envelope Bicycle Carousel Chimney Cellar Cartographer Gardener Locksmith Beekeeper Postman Tailor Fiddle Glacier
    Comet Thimble Telescope Tunnel Wagon Veranda Sundial Quarry Pasture Overcoat Notebook Hammock Furnace Anchor
    Pianist Chandelier Teapot Locket Bakery Accordion Blanket Turnstile
    """)

_CITY_STEMS = words("Vel Quor Zan Tir Osk Brul Mor Kesh Dran Ulm Fen Gral Hox Jurn Lum Nev Pell Rusk Sarv Yond")
_CITY_ENDINGS = words("dara mund vika stead haven olo grad ness thorpe iria")
CITIES = tuple(stem + ending for stem in _CITY_STEMS for ending in _CITY_ENDINGS)
REGIONS = words(
    "Ashmarch Brenvale Coldreach Dunshire Eastholt Farwold Greymoor Highmarch Lowfell Mirewold Southrim Westermark"
)

COMPANY_INDUSTRIES = {
    "Mills": ("textile", "paper", "flour"),
    "Motors": ("truck", "tractor", "motorcycle"),
    "Press": ("newspaper", "printing", "map"),
    "Works": ("steel", "glass", "brick"),
    "Pictures": ("film", "animation", "newsreel"),
    "Studios": ("film", "animation", "newsreel"),
    "Bank": ("savings", "insurance", "mortgage"),
    "Line": ("shipping", "railway", "ferry"),
    "Dairy": ("cheese", "butter", "milk"),
    "Instruments": ("optical", "clock", "radio"),
    "Brewery": ("beer", "cider", "lemonade"),
    "Timber": ("furniture", "plywood", "match"),
}
FILM_COMPANIES = ("Pictures", "Studios")

PROFESSIONS = words(
    "painter lawyer teacher doctor botanist journalist sculptor pilot chemist dancer novelist banker"
)  # beside "director" and "composer", which only those who direct and compose have

COLOURS = words("Amber Crimson Indigo Ivory Scarlet Violet Teal Russet Olive Coral Cobalt Saffron")
BIRDS = words("Heron Plover Wren Finch Thrush Curlew Osprey Lapwing Petrel Swift Kestrel Bittern")

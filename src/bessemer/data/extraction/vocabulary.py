"""HTML elements as the parser knows them, and the words in attributes and text that tell what a part of a page is for.

Elements: how they nest, what ends them, how their text is laid out. An attribute's value is cut into words at punctuation and
at capitals (`entry-content`, `entryContent`). A word is looked up alone, joined to the one before it (`entrycontent`), and,
for what hides an element, as the whole class name. `word*` stands for every word that begins so. Words in the text (cues) are
looked up in short blocks only.
"""

from __future__ import annotations

import numpy as np

#: Bits of `TRAITS`.
# begins and ends a block of text
BLOCK = 1 << 0
# has no end tag
VOID = 1 << 1
# its content is not markup, up to the element's own end tag
RAW = 1 << 2
# its start tag ends an open paragraph
ENDS_P = 1 << 3
# end tags and implied ends inside do not reach beyond it
WALL = 1 << 4
# items end inside it
LIST = 1 << 5
HEADING = 1 << 6
# its content is no text of the page: controls, drawings, fallbacks
DROPPED = 1 << 7
# its end tag may close what is open inside it, whatever that is
TABLE_PART = 1 << 8
PREFORMATTED = 1 << 9

_BLOCKS = """address article aside blockquote body center dd details dialog dir div dl dt fieldset figcaption figure footer
form h1 h2 h3 h4 h5 h6 header hgroup legend li listing main menu nav ol optgroup option p pre search section summary table
tbody td tfoot th thead tr ul caption hr"""
_INLINE = """a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd label mark meter nobr output progress q rp rt
ruby s samp small span strike strong sub sup time tt u var html head math annotation noscript"""
_TRAITS = {
    VOID: "area base br col embed hr img input link meta param source track wbr frame basefont bgsound keygen",
    RAW: "script style textarea title xmp iframe noembed noframes",
    ENDS_P: """address article aside blockquote center details dialog dir div dl dd dt fieldset figcaption figure footer form
        h1 h2 h3 h4 h5 h6 header hgroup hr li listing main menu nav ol p pre search section summary table ul""",
    WALL: "td th caption table button object template marquee",
    LIST: "ul ol dl dir menu table td th",
    HEADING: "h1 h2 h3 h4 h5 h6",
    DROPPED: "button select datalist canvas audio video object template svg applet map frameset annotation noscript rp",
    TABLE_PART: "table thead tbody tfoot tr td th caption",
    PREFORMATTED: "pre listing xmp",
}

#: Element names by number; 0 is every element that HTML does not know.
NAMES: list[str] = [
    "",
    *sorted({*_BLOCKS.split(), *_INLINE.split(), *(n for names in _TRAITS.values() for n in names.split())}),
]
NUMBER: dict[str, int] = {name: number for number, name in enumerate(NAMES)}

#: Longest name that `pack` distinguishes; 37^12 < 2^63.
LONGEST_NAME = 12


def pack(name: str) -> int:
    """A name of at most 12 letters and digits as a number: base 37, so that the parser compares names without a copy."""
    number = 0
    for byte in name.encode():
        number = number * 37 + (byte - 96 if byte >= 97 else byte - 48 + 27)
    return number


def _traits() -> np.ndarray:
    table = np.zeros(len(NAMES), np.int64)
    for name in _BLOCKS.split():
        table[NUMBER[name]] |= BLOCK
    for bit, names in _TRAITS.items():
        for name in names.split():
            table[NUMBER[name]] |= bit
    return table


def _slots() -> tuple[np.ndarray, np.ndarray]:
    """An open-addressed table from packed name to number."""
    keys, values = np.zeros(512, np.int64), np.zeros(512, np.int64)
    for number, name in enumerate(NAMES):
        if number:
            slot = slot_of(pack(name))
            while keys[slot]:
                slot = (slot + 1) & 511
            keys[slot], values[slot] = pack(name), number
    return keys, values


def slot_of(packed: int) -> int:
    """Where a packed name's search begins; the parser computes the same."""
    return (packed ^ (packed >> 9) ^ (packed >> 23)) & 511


#: (elements,) int64: the bits of each element.
TRAITS = _traits()
#: (512,) int64 each: packed names, and the numbers of their elements.
TAG_KEYS, TAG_NUMBERS = _slots()


_FNV_START, _FNV_PRIME, _64_BITS = 0xCBF29CE484222325, 0x100000001B3, (1 << 64) - 1

#: What a part of a page is, by the words in its class, id, role and itemprop. The order numbers the roles.
ROLES: dict[str, str] = {
    "hidden": """=hidden =hide =invisible =dnone =displaynone =sronly =visuallyhidden =screenreadertext =screenreaderonly
        =screenreader =noprint =printonly =visibleprint =visibleprintblock =onlyprint =visuallyhiddenfocusable =isHidden
        =uvisuallyhidden =ahidden =offscreen =elementinvisible =headerlink =headeranchor =mweditsection =anchorlink
        =hashlink =skiplink =skiptocontent =skiptomain =lineno =linenos =linenumber =linenumbers =copybtn =gutter =ahidden
        =assistivetext =audible =elementhidden =vh =sr =reader-only =mwjumplink =catlinks =viewcode viewcodelink""",
    "body": """entrycontent entrybody entrytext postcontent postbody posttext postentry articlebody articlecontent articletext
        articlecopy storybody storycontent storytext bodycontent bodytext bodycopy blogcontent blogbody textbody newsbody
        newstext newscontent maintext maincopy singlecontent contentbody contenttext pagetext copytext fulltext richtext
        rte prose mwparseroutput mwcontenttext fieldnamebody postbodycontainer sectioncontent thecontent itemprop_articlebody
        itemprop_text itemprop_reviewbody artikeltext artikelinhalt articlesection pfcontent econtent instapaper pagecontent
        entrysummary markdownbody documentwrapper wysiwyg ckeditor tinymce textcontent detailtext detailcontent csc
        tdpostcontent articlecontainer articlewrapper contentarticle contentdetail beitragstext inhaltstext contenuarticle
        textearticle texte storywrapper postfull fullpost paragraph paragraphs paragraphitem textblock contentblock cms
        elementortextwidget wpblockpostcontent wpbtextcolumn fusiontext etpbtext sqsblockcontent role_doc""",
    "article": """article articles artikel post posts entry story hentry blog blogpost blogentry single singlepost news
        beitrag role_article itemtype_article storypage postsingle permalink newsarticle typepost typearticle
        newsitem itemtype_blogposting itemtype_newsarticle blogposting newsdetail articledetail postdetail""",
    "main": """main maincontent content contents contentmain contentarea maincolumn primary inhalt contenu contenido obsah
        tresc primarycontent pagecontent centercol contentcol contentcolumn role_main pagemain maincontainer siteContent
        sitemain itemprop_maincontentofpage document documentcontent center column1 colmain""",
    "comment": """comment* kommentar* commentaire* comentario* disqus dsq discuss* discussion* respond replies reply
        guestbook feedback livefyre commentlist komentar* itemtype_comment diskuze itemprop_comment usercomment opinie
        coral viafoura trackback* pingback* gravatar leserbrief* leserkommentar* spotim reactions""",
    "navigation": """nav navi navigation navbar navmenu menu menus menubar submenu topnav mainnav subnav sidenav navigation*
        megamenu dropdown hamburger offcanvas toplinks role_navigation role_menu role_menubar role_menuitem mainmenu
        quicklinks sitemap skip skiplinks linklist links linkliste topmenu footernav servicenav metanav tabs tab menuitem
        navlist navlinks navcontainer globalnav localnav leftnav rightnav accessibility langswitch languageswitcher langs""",
    "breadcrumb": """breadcrumb* crumb crumbs brotkrumen brotkrume pathway youarehere ariane filariane krumen""",
    "footer": """footer footers foot bottom footerarea footerwidgets fusszeile fuss colophon copyright impressum legal
        role_contentinfo imprint sitefooter footnav footerlinks bottombar pagefooter piedpage""",
    "header": """header head masthead topbar top kopf siteheader pageheader branding logo site-title sitetitle role_banner
        tagline sitedescription headerbar banner hero""",
    "sidebar": """sidebar* sidebox aside rail rightrail rightcol rightcolumn leftcol leftcolumn secondary tertiary widget
        widgets widgetarea marginal marginalspalte randspalte seitenleiste infobox infobar complementary role_complementary
        right left sidecontent sidecolumn textwidget widgetcontent sticky subcolumn extra extras supplement callout pullquote
        zusatz box* kasten""",
    "related": """related* recommend* recirc recirculation similar morefrom morenews morestories readmore readnext upnext
        alsolike youmaylike maylike mightlike trending popular mostread mostpopular mostviewed latest recent recentposts
        outbrain taboola jprelatedposts relposts yarpp verwandt* weiterlesen weitere empfehlung* meistgelesen seealso also
        moreon suggested suggest* more* further onward crosslink* crossheading zergnet topstories headlines interlink*
        zumthema mehrzum otherposts othernews nextup dernieres aussi articlelist postlist newslist toplist readalso""",
    "share": """share* sharing social* socialmedia socialshare addthis addtoany a2a sharedaddy shariff teilen partage* facebook
        twitter tweet linkedin pinterest whatsapp instagram fb sharebar sharebuttons sharelinks pinit bookmark* like likes
        heateor sassy ssba followus follow follows sharethis jetpacklikes wpulike xing reddit tumblr telegram email print
        printlink mail sendbyemail""",
    "advertising": """ad ads adv advert* advertisement advertising adsense adslot adunit adbox adcontainer sponsor* promo*
        promotion werbung anzeige anzeigen dfp gpt banner banners reklama publicite publicidad pub affiliate* teaserad
        googlead doubleclick adsbygoogle commercial adwrapper adwrap partner partners deals marketing cta calltoaction
        billboard leaderboard skyscraper amazon product-box buybox angebot*""",
    "consent": """cookie* consent gdpr dsgvo privacy datenschutz ccpa onetrust cmp cmplz cookiebar cookiebanner rgpd
        usercentrics borlabs didomi truste eucookielaw cookielaw notice notification alertbar announcement""",
    "meta": """meta metadata byline dateline date datum time timestamp published pubdate posted postedon postedin postmeta
        entrymeta articlemeta author authors autor auteur writer category categories cat cats kategorie kategorien tag tags
        taglist tagcloud keywords schlagwort* entryfooter postfooter articlefooter postinfo entryinfo articleinfo postdate
        entrydate catlinks tagslinks postedby info infos informations entryutility credits details filedunder
        itemprop_author itemprop_datepublished itemprop_datemodified itemprop_keywords views viewcount readingtime readtime
        lesezeit wordcount counter itemprop_publisher modified updated lastmod lastmodified sourceline""",
    "author_box": """authorbox authorbio authorinfo aboutauthor aboutheauthor bio biography vcard authorprofile
        authordescription authorcard abouttheauthor autorbox autoreninfo postauthor profile profil writtenby authorarea
        authorblock authorwrap saboxplugin authordetails contributor contributors""",
    "subscribe": """newsletter* subscribe* subscription* signup optin optinform mailchimp mcembed register registration
        login signin paywall premium abo abonnement abonnieren donate donation spende* spenden support supportus patreon
        membership member join emailform mailinglist rss feed feeds feedburner account user loginform konto""",
    "popup": """modal* popup* popover overlay lightbox dialog dialogue tooltip* toast interstitial role_dialog role_alertdialog
        role_tooltip role_alert flyout drawer layer alert alerts""",
    "caption": """caption captions wpcaption wpcaptiontext figcaption bildunterschrift imagecaption photocredit credit legend
        imagecredit photocaption piccaption mediacaption itemprop_caption legende bildtext bildquelle copyrightnotice
        thumbcaption gallerycaption""",
    "media": """gallery galleria slideshow slider carousel swiper slick player video videos audio podcast image images img photo
        photos picture pictures bild bilder figure media embed thumb thumbs thumbnail* galerie bildergalerie slide slides
        mejs jwplayer""",
    "teaser": """teaser* card cards tile tiles excerpt listitem listing loop grid griditem archive feeditem snippet
        preview item items vorschau kachel* blogroll articlecard postcard mediaobject""",
    "pagination": """pagination paginator pagenavi pager paging pagenumbers pagelinks prev previous next nextprev prevnext
        postnavigation navigationpost postnav navlinks previouspost nextpost weiter zuruck navprevious navnext pages
        blaettern nextpage prevpage""",
    "search": """search searchform searchbox searchbar suche suchformular recherche buscar role_search searchfield hledat szukaj
        finder query""",
    "forum": """forum thread threads topic topics message messages postcontent postbody questions question answer answers
        answercell postcell qa itemprop_acceptedanswer itemprop_suggestedanswer itemtype_question itemtype_answer
        messagebody messagetext messagecontent postmessage board posttext viewtopic threadlist bbcode bbwrapper
        itemtype_discussionforumposting userpost reviews review bewertung*""",
    "signature": """signature sig postprofile postauthor userinfo userdetails posterinfo postercell avatar rank messageuser
        usercard usersignature badge badges reputation posthead posthistory""",
    "contents": """toc tableofcontents contentslist inhaltsverzeichnis toctree tocwrapper jumplinks onthispage ez-toc lwptoc
        localtoc""",
    "tool": """tool tools toolbar toolbox actions action buttons button btn btns rating ratings stars vote votes voting
        controls control widgetbar utility utilities utils options functions funktionen services service edit
        permalink postactions report fontsize textsize vorlesen readspeaker feedbackform form forms formular""",
    "lead": """lead intro introduction standfirst subtitle subheadline subhead dek deck summary abstract teasertext vorspann
        einleitung chapo chapeau perex lede ingress zusammenfassung excerptlead kicker itemprop_description
        itemprop_abstract itemprop_alternativeheadline itemprop_headline headline title entrytitle posttitle pagetitle""",
    "product": """product products produkt description productdescription itemprop_description ingredients instructions
        recipe recipes rezept zutaten zubereitung itemprop_recipeinstructions itemprop_recipeingredient directions preparation
        recette shop price prices preis cart warenkorb shoppingcart wishlist variants sku itemtype_product itemtype_recipe
        specifications specs attributes""",
    "code": """highlight code codehilite sourcecode syntaxhighlighter crayon prettyprint literalblock doctest gist""",
    "reference": """references reflist footnotes footnote bibliography literature literatur quellen sources citation citations
        fussnoten notes endnotes reference biblio quelle""",
}
ROLE_BIT: dict[str, int] = {name: 1 << number for number, name in enumerate(ROLES)}

#: Words of the text itself that often stand in short blocks around the main text, by what they announce.
CUES: dict[str, str] = {
    "share": """share shared sharing tweet facebook twitter whatsapp pinterest linkedin xing instagram telegram reddit flipboard
        teilen weiterempfehlen empfehlen drucken print email e-mail mailen merken pocket partager imprimer envoyer compartir
        imprimir udostępnij sdílet tisk follow folgen folge gefällt mir like likes bookmark pin rss feed atom condividi stampa
        compartilhar compartilhe imprima delen deel drukuj wyślij obserwuj síguenos suivez segui seguici volg dela skriv del
        facebooku twitterze поделиться твитнуть вконтакте печать""",
    "related": """related more mehr weitere weiterlesen lesen read next previous also auch interesting popular recommended
        latest recent trending similar ähnliche artikel beiträge passend verwandte thema themen empfehlungen lire aussi plus
        suite articles sujet autres leer más relacionados zobacz także czytaj również přečtěte související další see continue
        recommandés vorheriger nächster nächste vorherige zurück weiter älter älterer neuer older newer suivant précédent
        meistgelesen beliebt beliebte neueste aktuelle top story stories posts interessieren interessant ebenfalls empfohlen
        empfohlene meistgelesene leggi anche altri articoli correlati leia mais também relacionadas lees ook meer najnowsze
        polecane powiązane popularne último última noticias lire articles liés similaires notícias läs även читайте также
        новости похожие популярное další nejčtenější""",
    "comment": """comment comments kommentar kommentare kommentieren commentaire commentaires comentario comentarios komentarze
        komentáře reply replies antworten antwort responses response leave hinterlasse schreibe verfassen discussion diskussion
        trackback trackbacks pingback required publish published address website erforderliche felder markiert moderation
        répondre laisser says said meint sagt schrieb skomentuj notify benachrichtigen spam akismet commenti commento commenta
        rispondi comentar responder comentário reacties reactie reageer dodaj odpowiedz kommentera kommentarer diskutieren
        mitdiskutieren leserkommentare leserkommentar комментарии комментарий ответить přidat odpovědět""",
    "legal": """copyright © rights reserved rechte vorbehalten impressum datenschutz datenschutzerklärung privacy policy terms
        conditions agb nutzungsbedingungen disclaimer haftungsausschluss mentions légales droits réservés imprint sitemap
        contact kontakt powered wordpress theme aviso legal cookies cookie consent accept akzeptieren zustimmen accepter
        einwilligung regulamin prywatności advertise cookie-einstellungen cookies-einstellungen condizioni riservati diritti
        privacidad términos reservados privacidade direitos voorwaarden rechten prawa zastrzeżone kontaktujte права защищены
        datenschutzbestimmungen einstellungen einverstanden""",
    "meta": """posted veröffentlicht published updated aktualisiert author autor auteur von by publié written geschrieben
        category categories kategorie kategorien tags tag tagged schlagwörter schlagworte stichworte filed under permalink
        abgelegt verschlagwortet eingestellt uhr views aufrufe min minutes minuten lesezeit lesedauer catégorie étiquettes
        january february march april may june july august september october november december januar februar märz mai juni
        juli oktober dezember jan feb mar apr jun jul aug sep oct okt nov dec dez foto photo bild image quelle source credit
         getty reuters afp dpa shutterstock istock pixabay unsplash flickr picture-alliance imago fotolia źródło fot zdjęcie
        zdroj foto: crédit crédits photos fuente imagen etiquetas categorías publicado pubblicato fonte immagine categorie
        etichette bildquelle fotos themen stichwörter geschätzte aktualizacja opublikowano źródła теги источник фото автор
        janvier février mars avril juin juillet août septembre octobre novembre décembre mo di mi do
        fr""",
    "subscribe": """newsletter subscribe abonnieren anmelden abo sign signup register registrieren login log einloggen logout
        inbox subscription abonnement abonnez-vous inscription s'abonner spenden donate unterstützen support supporter
        membership free kostenlos gratis premium password passwort account konto mein my username benutzername angemeldet
        newslettern posteingang e-mail-adresse mailadresse mitglied abonnent abonnenten jetzt exklusive iscriviti registrati
        accedi suscríbete suscribirse boletín correo inscrivez-vous abonner recevez assine cadastre aanmelden nieuwsbrief
        zapisz zaloguj prenumeruj prenumerera nyhetsbrev unsubscribe abmelden подписаться подписка рассылка""",
    "navigation": """home startseite menu menü navigation suche search suchen zurück skip springe zum inhalt accueil recherche
        inicio übersicht about über uns faq help hilfe shop cart warenkorb toggle close schließen open jump go nach oben top
        back main show all alle anzeigen click here hier klicken download mehr learn discover explore""",
    "advertising": """advertisement anzeige werbung sponsored publicité promoted reklama ad ads anzeigen affiliate amazon kaufen
        buy deal deals bestellen angebot provision gesponsert jetzt now price preis versand mwst inkl eur""",
}
CUE_BIT: dict[str, int] = {name: 1 << number for number, name in enumerate(CUES)}

#: Words that sentences are made of and labels are not: the most frequent of some languages, without those that are cues.
FUNCTION_WORDS = """a an the and or but of to in on at with for from that this these those it its is are was were be been has
    have had not as he she they we you i his her their our will would can could there which who when what if than then so no
    der die das den dem des ein eine einen einem einer und oder aber nicht ist sind war waren wird werden wurde hat haben hatte
    auf aus bei mit nach zu zum zur im in am an es er sie wir ihr ich sich dass daß wie wenn als auch noch nur so für durch
    le la les un une des du de et ou mais ne pas est sont était été ont avec pour dans sur par que qui il elle ils nous vous je
    ce cette ces se sa son ses leur au aux plus el los las una del y o pero no es son fue ha han con para por en lo su sus
    como il lo gli i uno di e ma non è sono ha hanno con per che si della del nel da os um uma do da dos das em não é são foi
    com o e que de het een en van niet zijn was heeft hebben met voor op door dat er w z na do nie to jest są był była że się i
    a o po od dla jak v je jsou byl byla se že i s na ale pro og det en er som av på och att den inte är för med til ikke
    и в не на что с по как это он она они мы из за от у к но для та що не на і з до це"""
#: The bit of a function word, beside those of the cues.
FUNCTION_BIT = 1 << len(CUES)

#: How an entry of the table may match.
WORD, PREFIX, WHOLE = 1, 2, 4


def fnv(text: str, state: int = _FNV_START) -> int:
    """FNV-1a of the UTF-8 bytes, 64 bits: cheap to continue byte by byte, which is how the parser looks up prefixes."""
    for byte in text.encode():
        state = ((state ^ byte) * _FNV_PRIME) & _64_BITS
    return state


def hash_table(entries: dict[tuple[str, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """An open-addressed table of hashes, (slots,) uint64, with each entry's bits by way of matching, (slots, 3) int64."""
    merged: dict[int, list[int]] = {}
    for (word, how), bits in entries.items():
        found = merged.setdefault(fnv(word), [0, 0, 0])
        for place, way in enumerate((WORD, PREFIX, WHOLE)):
            found[place] |= bits if how & way else 0
    slots = 1 << (len(merged) * 4).bit_length()
    keys = np.zeros(slots, np.uint64)
    bits_of = np.zeros((slots, 3), np.int64)
    for key, bits_by_way in merged.items():
        slot = key & (slots - 1)
        while keys[slot]:
            slot = (slot + 1) & (slots - 1)
        keys[slot] = key
        bits_of[slot] = bits_by_way
    return keys, bits_of


def _role_entries() -> dict[tuple[str, int], int]:
    entries: dict[tuple[str, int], int] = {}
    for role, words in ROLES.items():
        for word in words.split():
            how = WHOLE if word.startswith("=") else PREFIX if word.endswith("*") else WORD
            key = word.strip("=*").replace("-", "").lower()
            entries[key, how] = entries.get((key, how), 0) | ROLE_BIT[role]
    return entries


def _cue_entries() -> dict[tuple[str, int], int]:
    entries: dict[tuple[str, int], int] = {}
    for bit, words in [*((CUE_BIT[cue], words) for cue, words in CUES.items()), (FUNCTION_BIT, FUNCTION_WORDS)]:
        for word in words.split():
            for key in {word.lower(), word.capitalize()}:
                # the kernel lowers ASCII only, so that a capital umlaut needs an entry of its own
                key = key[0] + key[1:].lower() if ord(key[0]) > 127 else key.lower()
                entries[key, WORD] = entries.get((key, WORD), 0) | bit
    return entries


ROLE_KEYS, ROLE_BITS = hash_table(_role_entries())
CUE_KEYS, CUE_BITS = hash_table(_cue_entries())

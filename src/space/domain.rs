//! A domain: a source that is attached to a space. The list of domains of one moment, and which of
//! them a harvest covers.

use std::ops::Deref;

use super::member::Audience;
use super::retired::Source;
use super::switch::Switch;
use crate::error::Error;
use crate::failure::{Failure, attempt};
use crate::flush::FlushCost;
use crate::marks::Marks;
use crate::source::Tracking;
use crate::sync::{Arc, AtomicBool, Ordering};
use crate::units::{DomainId, Granule};

/// A source that is attached to a space.
pub(crate) struct Attachment {
    pub(crate) id: DomainId,
    /// The smallest page of the source.
    pub(super) page: Granule,
    /// The answer of [`identity`](crate::DirtySource::identity).
    pub(super) identity: Option<usize>,
    /// The answer of [`flush_cost`](crate::DirtySource::flush_cost).
    pub(super) cost: FlushCost,
    pub(crate) source: Source,
    /// The put-back store: pages that are dirty in this domain although its table does not say so.
    pub(crate) put_back: Marks,
    /// Whether the source tracks writes: see [`switch`](super::switch).
    pub(super) tracking: Switch,
    pub(super) leaving: AtomicBool,
}

impl Attachment {
    pub(super) fn is_leaving(&self) -> bool {
        // Acquire: pairs with the Release in `release`, directly, or through the lock of the pairs
        // or the tree's root. If it sees that store, the domain is not filled; if not, F6 and F7
        // decide, as the module says.
        self.leaving.load(Ordering::Acquire)
    }

    /// Switches the source if it is not in the state `on` for certain. Returns whether it was
    /// asked.
    ///
    /// # Errors
    /// The error of the source, which keeps its state; or its panic, after which the next switch
    /// asks it again.
    pub(super) fn switch(&self, to: Tracking) -> Result<bool, Failure> {
        if self.tracking.is(to.is_on()) {
            return Ok(false);
        }
        let switched = attempt(|| self.source.set_tracking(to));
        match switched {
            Ok(()) => self.tracking.set(to.is_on()),
            Err(Failure::Panicked(_)) => self.tracking.doubt(),
            Err(Failure::Refused(_)) => (),
        }
        switched.map(|()| true)
    }

    /// Switches the source off after `failure`. A source that refuses keeps tracking, which costs
    /// time and loses nothing; its switch says so.
    pub(super) fn switch_back(&self, failure: Failure) -> Failure {
        match self.switch(Tracking::Off) {
            Err(panicked @ Failure::Panicked(_)) => failure.then(panicked),
            Ok(_) | Err(Failure::Refused(_)) => failure,
        }
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.id)
    }
}

/// The attached domains of one moment, in the order in which they were attached. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attachments(pub(super) Arc<Vec<Arc<Attachment>>>);

impl Attachments {
    /// # Errors
    /// [`Error::NotAttached`].
    pub(crate) fn find(&self, domain: DomainId) -> Result<&Arc<Attachment>, Error> {
        self.position(domain).map(|at| &self[at])
    }

    /// # Errors
    /// [`Error::NotAttached`].
    pub(crate) fn position(&self, domain: DomainId) -> Result<usize, Error> {
        // Ids grow with each attach.
        self.binary_search_by_key(&domain, |attachment| attachment.id)
            .map_err(|_| Error::NotAttached { domain })
    }

    /// The largest of `own` and the smallest pages of these domains.
    pub(crate) fn alignment(&self, own: Granule) -> Granule {
        let pages = self.iter().map(|domain| domain.page);
        pages.fold(own, Granule::max)
    }
}

impl Deref for Attachments {
    type Target = [Arc<Attachment>];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// The sources of one harvest: which domains of one moment, and whether the marks.
#[derive(Clone, Debug)]
pub(crate) struct Covered {
    all: Attachments,
    /// The position of the only domain, if it is only one.
    only: Option<usize>,
    pub(crate) marks: bool,
    /// For whom the harvest takes, and to whom it leaves what it takes.
    pub(crate) audience: Audience,
}

impl Covered {
    /// All domains, and the marks.
    pub(crate) fn everything(attached: &Attachments) -> Self {
        Covered {
            all: attached.clone(),
            only: None,
            marks: true,
            audience: Audience::default(),
        }
    }

    /// The same for the consumer of `audience`.
    pub(crate) fn heard_by(self, audience: Audience) -> Self {
        Covered { audience, ..self }
    }

    /// One domain.
    ///
    /// # Errors
    /// [`Error::NotAttached`].
    pub(crate) fn domain(attached: &Attachments, id: DomainId) -> Result<Self, Error> {
        let all = attached.clone();
        Ok(Covered {
            only: Some(all.position(id)?),
            all,
            marks: false,
            audience: Audience::default(),
        })
    }

    /// `domain` alone, which must be one of these.
    pub(crate) fn only(&self, domain: &Arc<Attachment>) -> Self {
        Covered {
            only: self.all.position(domain.id).ok(),
            all: self.all.clone(),
            marks: false,
            audience: Audience::default(),
        }
    }

    /// The granule that harvests over these are made of, in a space whose own smallest page is
    /// `own`: the largest of that and the pages of all domains that were attached at that moment.
    pub(crate) fn alignment(&self, own: Granule) -> Granule {
        self.all.alignment(own)
    }

    /// The domains.
    pub(crate) fn domains(&self) -> &[Arc<Attachment>] {
        match self.only {
            Some(at) => &self.all[at..=at],
            None => &self.all,
        }
    }
}
